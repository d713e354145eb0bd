package ociruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"godwit.io/hooks/internal/state"
)

// Main runs as the OCI runtime `godwit-runc`.
func Main(dirs state.Dirs, argv []string) int {
	call := Parse(argv[1:])
	real, err := realRuntime(dirs)
	if err != nil {
		return fail(call, err)
	}
	switch call.Name {
	case "kill", "exec", "pause", "resume", "update", "delete":
		if guarded(dirs, call) && (call.Name != "delete" || forced(call)) {
			return whileGuarded(call)
		}
	}
	switch call.Name {
	case "create":
		container, err := successor(dirs, call)
		if err != nil {
			return fail(call, err)
		}
		if container != nil {
			return restore(dirs, real, call, *container)
		}
	case "start":
		if id := call.ContainerID(); dirs.Restored(id) {
			dirs.MarkStarted(id)
			return 0
		}
	case "state":
		if id := call.ContainerID(); dirs.Restored(id) && !dirs.Started(id) {
			return stateBeforeStart(real, argv)
		}
	case "delete":
		dirs.Forget(call.ContainerID())
	}
	return pass(call, real, argv)
}

func realRuntime(dirs state.Dirs) (string, error) {
	data, err := os.ReadFile(filepath.Join(dirs.Opt, "etc", "hook.json"))
	if err != nil {
		return "", fmt.Errorf("which runtime to stand before is unknown: %w", err)
	}
	var settings struct {
		Runtime string `json:"runtime"`
	}
	if err := json.Unmarshal(data, &settings); err != nil || settings.Runtime == "" {
		return "", fmt.Errorf("etc/hook.json names no runtime (%v)", err)
	}
	if itself(settings.Runtime) {
		return "", fmt.Errorf("etc/hook.json names %s, which is this program: name the real runtime", settings.Runtime)
	}
	return settings.Runtime, nil
}

// itself tells a wrapper that would exec itself for ever.
func itself(path string) bool {
	named, err := os.Stat(path)
	if err != nil {
		return false
	}
	own, err := os.Stat("/proc/self/exe")
	return err == nil && os.SameFile(named, own)
}

func pass(call Command, real string, argv []string) int {
	argv[0] = real
	return fail(call, fmt.Errorf("%s: %w", real, syscall.Exec(real, argv, os.Environ())))
}

func guarded(dirs state.Dirs, call Command) bool {
	for _, word := range call.Positional {
		if dirs.Guarded(word) {
			return true
		}
	}
	return false
}

// forced: runc itself refuses to delete what runs, unless it is told to kill it first.
func forced(call Command) bool { return call.Has("force") || call.Has("f") }

// whileGuarded answers for a container whose processes are on their way to another node.
// What the kubelet does to a deleted pod must not reach them, and must not fail either, or it
// would go on to stronger means.
func whileGuarded(call Command) int {
	switch call.Name {
	case "exec":
		return fail(call, errors.New("container is migrating"))
	case "delete":
		return fail(call, errors.New("container is migrating: it cannot be deleted by force now"))
	}
	return 0
}

// successor returns where the container about to be created is restored from, nil for an
// ordinary one. Whatever is unclear about a successor is an error: it must never start empty.
func successor(dirs state.Dirs, call Command) (*state.Container, error) {
	data, err := os.ReadFile(filepath.Join(bundleOf(call), "config.json"))
	if err != nil {
		return nil, nil // runc says it better
	}
	var config struct {
		Annotations map[string]string `json:"annotations"`
	}
	if json.Unmarshal(data, &config) != nil {
		return nil, nil
	}
	notes := config.Annotations
	kind := first(notes, "io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType")
	podUID := first(notes, "io.kubernetes.cri.sandbox-uid", "io.kubernetes.pod.uid")
	name := first(notes, "io.kubernetes.cri.container-name", "io.kubernetes.container.name")
	if kind != "container" || podUID == "" {
		return nil, nil
	}
	expect, err := dirs.Expected(podUID)
	if err != nil || expect == nil {
		return nil, err
	}
	container, found := expect.Containers[name]
	if !found {
		return nil, fmt.Errorf("container %q is not one of the migration %s: a successor never starts empty", name, expect.Migration)
	}
	id := call.ContainerID()
	if !state.Safe(id) {
		return nil, fmt.Errorf("container id %q", id)
	}
	return &container, dirs.Claim(container, id)
}

func bundleOf(call Command) string {
	if bundle := call.Value("bundle", "b"); bundle != "" {
		return bundle
	}
	return "."
}

func first(notes map[string]string, keys ...string) string {
	for _, key := range keys {
		if value := notes[key]; value != "" {
			return value
		}
	}
	return ""
}

// restore runs `runc restore` in place of `runc create`.
func restore(dirs state.Dirs, real string, call Command, container state.Container) int {
	id := call.ContainerID()
	if err := dirs.MarkRestored(id); err != nil {
		return fail(call, err)
	}
	code, message := runRestore(dirs, real, call, container)
	pid := 0
	if data, err := os.ReadFile(call.Value("pid-file")); err == nil {
		pid, _ = strconv.Atoi(strings.TrimSpace(string(data)))
	}
	if code != 0 {
		dirs.Forget(id)
	}
	if err := dirs.WriteResult(container, state.Result{ContainerID: id, ExitCode: code, PID: pid, Error: message}); err != nil && code == 0 {
		return fail(call, err)
	}
	return code
}

func runRestore(dirs state.Dirs, real string, call Command, container state.Container) (int, string) {
	arguments := append([]string{}, call.Global...)
	arguments = append(arguments, "restore", "--detach", "--lazy-pages", "--tcp-established",
		"--file-locks", "--manage-cgroups-mode", "ignore",
		"--image-path", container.Images, "--work-path", container.Work)
	arguments = append(arguments, "--bundle", bundleOf(call))
	for _, name := range []string{"pid-file", "console-socket", "preserve-fds"} {
		if value := call.Value(name); value != "" {
			arguments = append(arguments, "--"+name, value)
		}
	}
	for _, name := range []string{"no-pivot", "no-subreaper"} {
		if call.Has(name) {
			arguments = append(arguments, "--"+name)
		}
	}
	arguments = append(arguments, call.ContainerID())

	// The parent's death signal belongs to the thread that started the child.
	runtime.LockOSThread()
	child := exec.Command(real, arguments...)
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
	child.Env = append(withoutPath(os.Environ()),
		"PATH="+filepath.Join(dirs.Opt, "gate")+":"+os.Getenv("PATH"),
		"GODWIT_GATE="+container.Dir,
		"CRIU_CONFIG_FILE="+filepath.Join(container.Dir, "criu.conf"))
	// If containerd gives up and kills us, nothing may go on restoring behind its back.
	child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	if err := child.Start(); err != nil {
		return fail(call, err), err.Error()
	}
	go func() {
		for received := range signals {
			_ = child.Process.Signal(received)
		}
	}()
	err := child.Wait()
	if err == nil {
		return 0, ""
	}
	code := child.ProcessState.ExitCode()
	if code <= 0 {
		code = 1
	}
	return code, lastError(call.Value("log"), container.Work)
}

func withoutPath(from []string) []string {
	kept := make([]string, 0, len(from)+3)
	for _, entry := range from {
		if !strings.HasPrefix(entry, "PATH=") {
			kept = append(kept, entry)
		}
	}
	return kept
}

// lastError is the end of CRIU's and runc's own words, for a person.
func lastError(log, work string) string {
	var words []string
	if data, err := os.ReadFile(filepath.Join(work, "restore.log")); err == nil {
		for _, line := range strings.Split(string(data), "\n") {
			if strings.Contains(line, "Error") && !strings.Contains(line, "RLIMIT") {
				words = append(words, line)
			}
		}
	}
	if len(words) == 0 {
		data, _ := os.ReadFile(log)
		words = strings.Split(strings.TrimSpace(string(data)), "\n")
	}
	if len(words) > 5 {
		words = words[len(words)-5:]
	}
	text := strings.Join(words, "; ")
	if len(text) > 2000 {
		text = text[len(text)-2000:]
	}
	return text
}

// stateBeforeStart answers `created` for a restored container until it is started: CRI-O
// refuses to start a container that already runs.
func stateBeforeStart(real string, argv []string) int {
	child := exec.Command(real, argv[1:]...)
	child.Stdin, child.Stderr = os.Stdin, os.Stderr
	out, err := child.Output()
	if err != nil {
		return max(1, child.ProcessState.ExitCode())
	}
	var value map[string]any
	if json.Unmarshal(out, &value) == nil && value["status"] == "running" {
		value["status"] = "created"
		if changed, err := json.MarshalIndent(value, "", "  "); err == nil {
			out = changed
		}
	}
	_, _ = os.Stdout.Write(out)
	return 0
}

// fail reports to containerd as runc does: one JSON line in the log file. Standard output and
// error may be the container's own log pipes.
func fail(call Command, err error) int {
	log := call.Value("log")
	if log == "" {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	line, _ := json.Marshal(map[string]string{
		"level": "error", "msg": "godwit: " + err.Error(), "time": time.Now().Format(time.RFC3339),
	})
	if file, openErr := os.OpenFile(log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600); openErr == nil {
		defer file.Close()
		_, _ = file.Write(append(line, '\n'))
	}
	return 1
}
