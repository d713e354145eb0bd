{{- define "godwit.labels" -}}
app.kubernetes.io/name: godwit
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "godwit.image" -}}
{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default (index . 0).Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- /* What the installer has to know of the node it works on. */}}
{{- define "godwit.installEnv" -}}
- name: GODWIT_NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
{{- with .Values.nodeAgent.installer.containerd }}
- name: GODWIT_RESTART_COMMAND
  value: {{ .restartCommand | quote }}
- name: GODWIT_CONTAINERD_CONFIG
  value: {{ .configFile | quote }}
- name: GODWIT_CONTAINERD_SOCKET
  value: {{ .socket | quote }}
{{- end }}
{{- end -}}

{{- /* The pod that `helm uninstall` runs on every node; the job adds name and node. */}}
{{- define "godwit.retirePod" -}}
metadata:
  labels:
    {{- include "godwit.labels" . | nindent 4 }}
    app.kubernetes.io/component: retire-node
spec:
  hostPID: true
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  restartPolicy: OnFailure
  serviceAccountName: godwit-node-agent
  priorityClassName: {{ .Values.nodeAgent.priorityClassName }}
  tolerations: [{operator: Exists}]
  {{- with .Values.images.pullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: retire
      image: {{ include "godwit.image" (list . .Values.images.nodeAgent) }}
      imagePullPolicy: {{ .Values.images.pullPolicy }}
      command: [python3, -m, godwit_agent.install, uninstall]
      terminationMessagePolicy: FallbackToLogsOnError
      securityContext: {privileged: true}
      env:
        {{- include "godwit.installEnv" . | nindent 8 }}
{{- end -}}
