package ociruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"godwit.io/hooks/internal/failpoint"
	"godwit.io/hooks/internal/gate"
	"godwit.io/hooks/internal/state"
)

// expected is what a successor's container does instead of starting: it is restored, or ends at
// once because it has done its work on the source.
type expected struct {
	container state.Container
	done      bool
}

// bundle is what its config.json says of a container (the OCI runtime specification, config.md).
type bundle struct {
	Annotations map[string]string `json:"annotations"`
	Process     struct{ SelinuxLabel string }
	Linux       struct {
		Namespaces []struct{ Type, Path string }
	}
}

// bundleFor is empty where there is no such file, or no JSON in it: runc says that better.
func bundleFor(call Command) bundle {
	var read bundle
	data, err := os.ReadFile(filepath.Join(bundleOf(call), "config.json"))
	if err != nil || json.Unmarshal(data, &read) != nil {
		return bundle{}
	}
	return read
}

// whose is the container's pod and name; no pod for a sandbox, and for what no CRI runtime has made.
func (b bundle) whose() (podUID, name string) {
	notes := b.Annotations
	if first(notes, "io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType") != "container" {
		return "", ""
	}
	return first(notes, "io.kubernetes.cri.sandbox-uid", "io.kubernetes.pod.uid"),
		first(notes, "io.kubernetes.cri.container-name", "io.kubernetes.container.name")
}

// ownCgroupNamespace: whether the container's cgroup is the root of what it sees, which is the rule
// where cgroup v2 is alone.
func (b bundle) ownCgroupNamespace() bool {
	for _, one := range b.Linux.Namespaces {
		if one.Type == "cgroup" {
			return one.Path == ""
		}
	}
	return false
}

// expectedOf is nil for an ordinary container. Whatever is unclear about a successor is an error:
// it must never start empty.
func expectedOf(dirs state.Dirs, call Command) (*expected, error) {
	podUID, name := bundleFor(call).whose()
	if podUID == "" {
		return nil, nil
	}
	expect, err := dirs.Expected(podUID)
	if err == nil && expect == nil {
		if pid := dirs.Living(podUID, name); pid != 0 {
			err = fmt.Errorf("container %q of this pod runs as process %d, which was moved here and which the runtime has lost: "+
				"it is not started a second time; deleting the pod ends it", name, pid)
		}
	}
	if err != nil || expect == nil {
		return nil, err
	}
	if id := call.ContainerID(); !state.Safe(id) {
		return nil, fmt.Errorf("container id %q", id)
	}
	if container, found := expect.Containers[name]; found {
		return &expected{container: container}, nil
	}
	if slices.Contains(expect.Done, name) {
		return &expected{done: true}, nil
	}
	return nil, fmt.Errorf("container %q is not one of the migration %s: a successor never starts empty", name, expect.Migration)
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

// restore runs `runc restore` in place of `runc create`, and ends when the process is there, or
// never will be. Whoever gives it up closes lease (nil: nobody does).
func restore(dirs state.Dirs, real string, call Command, container state.Container, lease *os.File) int {
	id, config := call.ContainerID(), bundleFor(call)
	code, message := 1, "failpoint"
	if failpoint.Reach(dirs, "restore.before") == nil {
		code, message = runRestore(dirs, real, call, config, container, lease)
		if code == 0 {
			// a crash here leaves a restored process that nobody was told of
			_ = failpoint.Reach(dirs, "restore.after")
		}
	}
	pid := 0
	if data, err := os.ReadFile(call.Value("pid-file")); err == nil {
		pid, _ = strconv.Atoi(strings.TrimSpace(string(data)))
	}
	if held := placeholderOf(container); held != 0 {
		if code == 0 && pid != held {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			code, message = 1, fmt.Sprintf("the process is number %d, the runtime was told %d", pid, held)
		}
		if code != 0 {
			reportExit(held)
		}
	} else if code == 0 {
		// The runtime waits for `create` still. Protected before the agent hears of it, whose
		// next word may be that it runs.
		waits := state.Waiting{PID: pid, Bundle: bundleOf(call), Startup: container.Startup}
		if err := dirs.MarkWaiting(id, waits); err != nil {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			code, message = 1, err.Error()
		}
	}
	if code == 0 && pid > 0 {
		if err := markMoved(dirs, id, config, pid); err != nil {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			code, message = 1, err.Error()
		}
	}
	if code != 0 {
		pid = 0
		dirs.Forget(id)
	}
	if err := dirs.WriteResult(container, state.Result{ContainerID: id, ExitCode: code, PID: pid, Error: message}); err != nil && code == 0 {
		return fail(call, err)
	}
	return code
}

// markMoved keeps the container from being created beside its process, should the runtime lose it.
func markMoved(dirs state.Dirs, id string, config bundle, pid int) error {
	podUID, name := config.whose()
	if podUID == "" {
		return errors.New("config.json does not say whose container it is")
	}
	err := dirs.MarkMoved(id, state.Moved{PodUID: podUID, Container: name, PID: pid})
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, os.ErrProcessDone) {
		return nil // it has ended: whoever asks for it next says so
	}
	return err
}

func runRestore(
	dirs state.Dirs, real string, call Command, config bundle, container state.Container, lease *os.File,
) (int, string) {
	if label := config.Process.SelinuxLabel; label != "" {
		// It would run on under the runtime's own label, hardly confined (hostops/inspector.py).
		err := fmt.Errorf("the runtime of this node gives the container the SELinux label %s, which CRIU cannot restore", label)
		return fail(call, err), err.Error()
	}
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
	if config.ownCgroupNamespace() {
		child.Env = append(child.Env, gate.CgroupNamespace+"=1")
	}
	// If containerd gives up and kills us, nothing may go on restoring behind its back.
	child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := child.Start(); err != nil {
		return fail(call, err), err.Error()
	}
	if lease != nil {
		go func() {
			if n, _ := lease.Read(make([]byte, 1)); n == 0 {
				_ = child.Process.Kill()
			}
		}()
	}
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
