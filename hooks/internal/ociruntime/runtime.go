package ociruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
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
	id := call.ContainerID()
	if waits := dirs.Waits(id); waits != nil {
		if code, answered := whileWaiting(dirs, call, *waits); answered {
			return code
		}
	}
	switch call.Name {
	case "create":
		expected, err := expectedOf(dirs, call)
		if err != nil {
			return fail(call, err)
		}
		switch {
		case expected == nil:
		case expected.done:
			err = endAtOnce(dirs, bundleOf(call))
		default:
			return create(dirs, real, call, expected.container)
		}
		if err != nil {
			return fail(call, err)
		}
	case "start":
		if dirs.Restored(id) {
			dirs.MarkStarted(id)
			return 0
		}
	case "exec":
		if dirs.TakePostStart(id, commandOf(call)) {
			return succeed(call)
		}
	case "ps":
		if guarded(dirs, call) {
			if pid := firstProcess(call); pid != 0 {
				return tellProcesses(pid)
			}
		}
	case "state":
		if dirs.Restored(id) && !dirs.Started(id) {
			return stateBeforeStart(real, argv)
		}
	case "delete":
		dirs.Forget(id)
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

// firstProcess is the container's own, 0 if it has ended. The guard has moved it out of the
// cgroup that runc would look into.
func firstProcess(call Command) int {
	data, err := os.ReadFile(filepath.Join(call.Value("root"), call.ContainerID(), "state.json"))
	if err != nil {
		return 0
	}
	var known struct {
		PID int `json:"init_process_pid"` // libcontainer's BaseState
	}
	if json.Unmarshal(data, &known) != nil || known.PID == 0 {
		return 0
	}
	if _, err := os.Lstat(filepath.Join("/proc", strconv.Itoa(known.PID))); err != nil {
		return 0
	}
	return known.PID
}

// tellProcesses answers `ps --format json`. A containerd that has been restarted gives a container
// without processes up (loadShim, core/runtime/v2/shim_load.go, 2.1), and the kubelet would start
// another.
func tellProcesses(pid int) int {
	data, _ := json.Marshal([]int{pid})
	_, _ = os.Stdout.Write(data)
	return 0
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
