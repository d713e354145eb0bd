// Package state is the files that the node agent and this binary share; see
// docs/architecture.md. Nothing here needs the agent to run.
package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Dirs are where things are; tests give their own.
type Dirs struct {
	Run string // /run/godwit: until the node is restarted
	Opt string // /opt/godwit
	Lib string // /var/lib/godwit: on disk
}

// Default reads GODWIT_RUN_DIR, GODWIT_OPT_DIR and GODWIT_LIB_DIR, which exist for tests.
func Default() Dirs {
	dirs := Dirs{Run: "/run/godwit", Opt: "/opt/godwit", Lib: "/var/lib/godwit"}
	if value := os.Getenv("GODWIT_RUN_DIR"); value != "" {
		dirs.Run = value
	}
	if value := os.Getenv("GODWIT_OPT_DIR"); value != "" {
		dirs.Opt = value
	}
	if value := os.Getenv("GODWIT_LIB_DIR"); value != "" {
		dirs.Lib = value
	}
	return dirs
}

var safeName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// Safe tells whether a name from outside can be one component of a path.
func Safe(name string) bool { return safeName.MatchString(name) }

// Guard keeps a container's processes alive while no Pod object protects them.
type Guard struct {
	Migration string `json:"migration"`
	Epoch     int64  `json:"epoch"`
	// DeadlineBoot in seconds of CLOCK_BOOTTIME, which nobody sets: a clock that is put
	// forward must not end a guard.
	DeadlineBoot int64 `json:"deadline_boot"`
	// DeadlineUnix is what agents before that wrote.
	DeadlineUnix int64 `json:"deadline_unix"`
}

// Container is where one container of a successor is restored from.
type Container struct {
	Dir    string `json:"dir"`
	Images string `json:"images"`
	Work   string `json:"work"`
	// PostStart is the command of its postStart hook, which has run long ago.
	PostStart []string `json:"post_start"`
	// Startup is the command of its startup probe, which has passed long ago.
	Startup []string `json:"startup"`
}

// Expect says that a pod is a successor.
type Expect struct {
	Migration string `json:"migration"`
	Epoch     int64  `json:"epoch"`
	IP        string `json:"ip"`
	// MoreIPs are those of the other family.
	MoreIPs    []string             `json:"more_ips"`
	Door       bool                 `json:"door"`
	Containers map[string]Container `json:"containers"`
	// Done are init containers: what they had to do they have done on the source.
	Done []string `json:"done"`
}

// IPs are the addresses that the pod brings along; none when it keeps the native ones.
func (e *Expect) IPs() []string {
	if e.IP == "" {
		return nil
	}
	return append([]string{e.IP}, e.MoreIPs...)
}

// Network is what CNI ADD gave a successor; its addresses are those of the first family.
type Network struct {
	IP            string `json:"ip"`
	NativeIP      string `json:"native_ip"`
	Gateway       string `json:"gateway"`
	Netns         string `json:"netns"`
	Interface     string `json:"interface"`
	HostInterface string `json:"host_interface"`
	SandboxID     string `json:"sandbox_id"`
	PodMAC        string `json:"pod_mac"`
	HostMAC       string `json:"host_mac"`
}

// Held is an address of a moved pod that must not be reissued.
type Held struct {
	IP       string   `json:"ip"`
	PodUID   string   `json:"pod_uid"`
	IPAMDirs []string `json:"ipam_dirs"`
}

// Result is how a restore ended.
type Result struct {
	ContainerID string `json:"container_id"`
	ExitCode    int    `json:"exit_code"`
	PID         int    `json:"pid"`
	Error       string `json:"error"`
}

// Guarded tells whether a guard protects the container now.
func (d Dirs) Guarded(containerID string) bool {
	if !Safe(containerID) {
		return false
	}
	var guard Guard
	err := readJSON(filepath.Join(d.Run, "guard", containerID), &guard)
	if errors.Is(err, fs.ErrNotExist) {
		return false
	}
	// A guard that cannot be read guards: killing is what cannot be undone.
	if err != nil {
		return true
	}
	if guard.DeadlineBoot == 0 {
		return time.Now().Unix() <= guard.DeadlineUnix
	}
	now, err := BootSeconds()
	return err != nil || now <= guard.DeadlineBoot
}

// BootSeconds is the time since the machine was booted.
func BootSeconds() (int64, error) {
	var now unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now)
	return now.Sec, err
}

// Expected returns what is expected of a pod, nil when it is no successor.
// An expectation that cannot be read is an error, and so is one that the node has lost when it
// was restarted: such a pod must not start.
func (d Dirs) Expected(podUID string) (*Expect, error) {
	if !Safe(podUID) {
		return nil, nil
	}
	directory := filepath.Join(d.Run, "expect", podUID)
	if _, err := os.Lstat(directory); errors.Is(err, fs.ErrNotExist) {
		return nil, d.lost(podUID)
	}
	expect := &Expect{}
	if err := readJSON(filepath.Join(directory, "expect.json"), expect); err != nil {
		return nil, fmt.Errorf("pod %s is the successor of a migration whose record cannot be read: %w", podUID, err)
	}
	return expect, nil
}

// lost tells of a successor whose expectation is gone: the node was restarted, or the migration
// was given up and the kubelet has not heard yet that the pod was deleted. The mark is written
// before the pod may be scheduled, and removed when the pod runs.
func (d Dirs) lost(podUID string) error {
	if d.Lib == "" {
		return nil
	}
	_, err := os.Lstat(filepath.Join(d.Lib, "successors", podUID))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return fmt.Errorf("pod %s is the successor of a migration that was given up, or that this node has forgotten (was it restarted?): a successor never starts empty; delete the pod when its PodMigration has ended", podUID)
}

// WriteNetwork records what ADD did.
func (d Dirs) WriteNetwork(podUID string, network Network) error {
	return d.write(filepath.Join(d.Run, "expect", podUID, "network.json"), network)
}

// Claim makes containerID the one that restores; an error says who was first.
func (d Dirs) Claim(container Container, containerID string) error {
	path := filepath.Join(container.Dir, "claimed")
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		first, _ := os.ReadFile(path)
		return fmt.Errorf("container %s has claimed the restore before: a successor restores once and never starts empty", first)
	}
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = file.WriteString(containerID)
	return err
}

// WriteResult records how the restore ended.
func (d Dirs) WriteResult(container Container, result Result) error {
	return d.write(filepath.Join(container.Dir, "result.json"), result)
}

// HeldAddresses lists the addresses that must not be reissued.
func (d Dirs) HeldAddresses() []Held {
	files, err := os.ReadDir(filepath.Join(d.Run, "held"))
	if err != nil {
		return nil
	}
	var found []Held
	for _, file := range files {
		var held Held
		if readJSON(filepath.Join(d.Run, "held", file.Name()), &held) == nil {
			found = append(found, held)
		}
	}
	return found
}

// Ring tells the agent to look again; nobody listening is no error.
func (d Dirs) Ring() {
	fd, err := syscall.Open(filepath.Join(d.Run, "doorbell"), syscall.O_WRONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer syscall.Close(fd)
	_, _ = syscall.Write(fd, []byte{'!'})
}

func readJSON(path string, into any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, into)
}

func (d Dirs) write(path string, value any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	part := path + ".part"
	if err := os.WriteFile(part, data, 0o600); err != nil {
		return err
	}
	if err := os.Rename(part, path); err != nil {
		return err
	}
	d.Ring()
	return nil
}
