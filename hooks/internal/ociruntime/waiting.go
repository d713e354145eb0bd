package ociruntime

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"

	"godwit.io/hooks/internal/state"
)

// whileWaiting answers for a container whose process has not come yet, or is stopped until the
// source has committed. What would end it must not reach it: it may be the only one soon.
func whileWaiting(dirs state.Dirs, call Command, waits state.Waiting) (int, bool) {
	switch call.Name {
	case "kill":
		// before the commit the agent hears of it in time, behind it this copy is the only one
		if err := dirs.MarkKilled(call.ContainerID()); err != nil {
			return fail(call, err), true
		}
		return 0, true
	case "pause", "resume", "update":
		return 0, true
	case "exec":
		command := commandOf(call)
		if dirs.TakePostStart(call.ContainerID(), command) {
			return succeed(call), true
		}
		// A sidecar must have started before the kubelet goes on to the next container.
		if len(waits.Startup) > 0 && reflect.DeepEqual(command, waits.Startup) {
			return succeed(call), true
		}
		// To the kubelet a probe that cannot be made has not failed (prober/worker.go).
		return fail(call, errors.New("container is migrating")), true
	case "delete":
		if forced(call) {
			return fail(call, errors.New("container is migrating: it cannot be deleted by force now")), true
		}
	case "ps":
		return tellProcesses(waits.PID), true // runc knows none yet
	case "state":
		status := "created"
		if dirs.Started(call.ContainerID()) {
			status = "running"
		}
		value := map[string]any{
			"ociVersion": "1.0.2", "id": call.ContainerID(), "pid": waits.PID, "status": status, "bundle": waits.Bundle,
		}
		data, _ := json.Marshal(value)
		_, _ = os.Stdout.Write(data)
		return 0, true
	}
	return 0, false
}

// commandOf is what `exec` is asked to run: of the process file, or the words after the container.
func commandOf(call Command) []string {
	path := call.Value("process", "p")
	if path == "" {
		return call.Positional[min(1, len(call.Positional)):]
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	var process struct {
		Args []string `json:"args"`
	}
	_ = json.Unmarshal(data, &process)
	return process.Args
}

// succeed answers `exec --detach` with a process that ends with 0 and has done nothing.
func succeed(call Command) int {
	child := exec.Command("/proc/self/exe")
	child.Args[0] = "godwit-done"
	if err := child.Start(); err != nil {
		return fail(call, err)
	}
	if path := call.Value("pid-file"); path != "" {
		if err := os.WriteFile(path, []byte(strconv.Itoa(child.Process.Pid)), 0o600); err != nil {
			return fail(call, err)
		}
	}
	if !call.Has("detach") && !call.Has("d") {
		_ = child.Wait()
	}
	return 0
}

// endAtOnce changes a bundle so that its process does nothing but end: what it had to do it has
// done on the source.
func endAtOnce(dirs state.Dirs, bundle string) error {
	const inside = "/godwit-done"
	path := filepath.Join(bundle, "config.json")
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var config map[string]any
	if err := json.Unmarshal(data, &config); err != nil {
		return err
	}
	process, isProcess := config["process"].(map[string]any)
	if !isProcess {
		return errors.New("config.json has no process")
	}
	process["args"] = []string{inside}
	process["cwd"] = "/"
	mounts, _ := config["mounts"].([]any)
	config["mounts"] = append(mounts, map[string]any{
		"destination": inside, "source": filepath.Join(dirs.Opt, "bin", "godwit-hook"),
		"type": "bind", "options": []string{"bind", "ro", "nosuid", "nodev"},
	})
	if linux, isLinux := config["linux"].(map[string]any); isLinux {
		delete(linux, "seccomp") // made for another program
	}
	changed, err := json.Marshal(config)
	if err != nil {
		return err
	}
	return os.WriteFile(path, changed, 0o600)
}
