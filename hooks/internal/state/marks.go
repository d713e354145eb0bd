package state

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
)

// Marks of restored containers: files in `restored`, named after the container and, but for the
// first, a suffix. They go when the container is deleted, but for `moved`, which goes with its process.
const (
	started   = ".started"
	waiting   = ".waiting"
	killed    = ".killed"
	postStart = ".post-start"
	moved     = ".moved"
)

// Waiting is a container that the runtime takes for running while its process is elsewhere.
type Waiting struct {
	PID     int      `json:"pid"` // of the placeholder, and of the process that will follow it
	Bundle  string   `json:"bundle"`
	Startup []string `json:"startup"`
}

func (d Dirs) mark(containerID, suffix string) string {
	return filepath.Join(d.Run, "restored", containerID+suffix)
}

func (d Dirs) marked(containerID, suffix string) bool {
	if !Safe(containerID) {
		return false
	}
	_, err := os.Lstat(d.mark(containerID, suffix))
	return err == nil
}

// MarkRestored makes start a no-op for a container, and its postStart hook one, once.
func (d Dirs) MarkRestored(containerID string, hook []string) error {
	if err := os.MkdirAll(filepath.Join(d.Run, "restored"), 0o700); err != nil {
		return err
	}
	if len(hook) > 0 {
		if err := d.write(d.mark(containerID, postStart), hook); err != nil {
			return err
		}
	}
	return os.WriteFile(d.mark(containerID, ""), nil, 0o600)
}

// Restored tells whether a container was restored rather than created.
func (d Dirs) Restored(containerID string) bool { return d.marked(containerID, "") }

// Moved is the first process of a restored container.
type Moved struct {
	PodUID    string `json:"pod_uid"`
	Container string `json:"container"`
	PID       int    `json:"pid"`
	Began     string `json:"began"` // its start in clock ticks: numbers are given again
}

// MarkMoved notes whose process it is, for as long as it lives.
func (d Dirs) MarkMoved(containerID string, value Moved) error {
	began, err := startOf(value.PID)
	if err != nil {
		return err
	}
	value.Began = began
	return d.write(d.mark(containerID, moved), value)
}

// Living is the process that a pod's container was restored to, 0 if there is none, or no more.
func (d Dirs) Living(podUID, container string) int {
	for _, value := range d.living() {
		if value.PodUID == podUID && value.Container == container {
			return value.PID
		}
	}
	return 0
}

// living are all of them; the marks of those that have ended go.
func (d Dirs) living() []Moved {
	var found []Moved
	paths, _ := filepath.Glob(d.mark("*", moved))
	for _, path := range paths {
		var value Moved
		if readJSON(path, &value) != nil {
			continue
		}
		if began, err := startOf(value.PID); err != nil || began != value.Began {
			_ = os.Remove(path)
		} else {
			found = append(found, value)
		}
	}
	return found
}

// startOf is field 22 of proc_pid_stat(5); the command before it may have spaces in it. A zombie
// lives no more.
func startOf(pid int) (string, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return "", err
	}
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return "", os.ErrProcessDone
	}
	return fields[19], nil
}

// Forget removes the marks of a container that is deleted, and of processes that have ended.
func (d Dirs) Forget(containerID string) {
	d.living()
	if Safe(containerID) {
		for _, suffix := range []string{"", started, waiting, killed, postStart} {
			_ = os.Remove(d.mark(containerID, suffix))
		}
	}
}

// MarkStarted notes that start has been called for a restored container, and tells the agent, which
// waits for it.
func (d Dirs) MarkStarted(containerID string) {
	_ = os.WriteFile(d.mark(containerID, started), nil, 0o600)
	d.Ring()
}

// Started tells whether start has been called for a restored container.
func (d Dirs) Started(containerID string) bool { return d.marked(containerID, started) }

// MarkKilled notes that the runtime has asked a container that waits to end: it has given it up.
func (d Dirs) MarkKilled(containerID string) error {
	return os.WriteFile(d.mark(containerID, killed), nil, 0o600)
}

// TakePostStart tells whether a command is the postStart hook of a restored container; once.
func (d Dirs) TakePostStart(containerID string, command []string) bool {
	if !d.marked(containerID, postStart) {
		return false
	}
	var hook []string
	path := d.mark(containerID, postStart)
	return readJSON(path, &hook) == nil && reflect.DeepEqual(hook, command) && os.Remove(path) == nil
}

// MarkWaiting notes which process stands for a container that waits; the agent removes the mark
// when the container runs.
func (d Dirs) MarkWaiting(containerID string, value Waiting) error {
	return d.write(d.mark(containerID, waiting), value)
}

// Waits returns what stands for a container that waits, nil when it does not, or no more.
func (d Dirs) Waits(containerID string) *Waiting {
	if !d.marked(containerID, waiting) {
		return nil
	}
	value := &Waiting{}
	data, err := os.ReadFile(d.mark(containerID, waiting))
	if err != nil || json.Unmarshal(data, value) != nil {
		return nil
	}
	if _, err := os.Lstat(filepath.Join("/proc", strconv.Itoa(value.PID))); err != nil {
		return nil
	}
	return value
}
