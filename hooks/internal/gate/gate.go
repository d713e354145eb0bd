// Package gate lets a CRIU that was started early wait until it is needed.
//
// runc calls `criu swrk FD` and sends one request on FD. A dump or a restore is
// told apart from other requests by peeking at it, waits at a FIFO, and becomes
// the real CRIU when the agent says so. What comes before, starting runc and
// loading its state, is then outside the freeze.
package gate

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"godwit.io/hooks/internal/failpoint"
	"godwit.io/hooks/internal/state"
)

// Request types of CRIU's RPC protocol (images/rpc.proto, enum criu_req_type).
const (
	requestDump    = 1
	requestRestore = 2
)

// CgroupNamespace names the variable that asks for a cgroup namespace around a restore.
//
// CRIU would make it with the cgroups that it restores; ours are the runtime's, and it restores
// none (--manage-cgroups-mode ignore). runc has put us into the container's cgroup before it sends
// the request (libcontainer, criuApplyCgroups), and that is the root of a namespace made now.
const CgroupNamespace = "GODWIT_CGROUP_NAMESPACE"

var errClosed = errors.New("the gate says no")

// Main runs as `criu`; it returns only on failure.
func Main(dirs state.Dirs, argv []string) int {
	directory := os.Getenv("GODWIT_GATE")
	if directory != "" && len(argv) > 2 && argv[1] == "swrk" {
		fd, err := strconv.Atoi(argv[2])
		if err == nil && mustWait(fd) {
			if err := hold(dirs, directory); err != nil {
				fmt.Fprintf(os.Stderr, "godwit: %s: %v\n", directory, err)
				return 1
			}
			if err := enterNamespace(); err != nil {
				fmt.Fprintf(os.Stderr, "godwit: a cgroup namespace: %v\n", err)
				return 1
			}
		}
	}
	binary := filepath.Join(dirs.Opt, "criu", "criu")
	argv[0] = "criu"
	err := syscall.Exec(binary, argv, environment(dirs, os.Environ()))
	fmt.Fprintf(os.Stderr, "godwit: %s: %v\n", binary, err)
	return 127
}

// enterNamespace is for the thread that goes on: it is the one that becomes CRIU.
func enterNamespace() error {
	if os.Getenv(CgroupNamespace) == "" {
		return nil
	}
	runtime.LockOSThread()
	return syscall.Unshare(syscall.CLONE_NEWCGROUP)
}

// mustWait peeks at the request: field 1 (type), a varint, comes first.
func mustWait(fd int) bool {
	head := make([]byte, 2)
	for {
		n, _, err := syscall.Recvfrom(fd, head, syscall.MSG_PEEK)
		if err == syscall.EINTR {
			continue
		}
		return err == nil && n == 2 && head[0] == 0x08 && (head[1] == requestDump || head[1] == requestRestore)
	}
}

// hold waits, with a placeholder beside it if somebody wants to know the number of the process
// that will be restored: the placeholder has it until then.
func hold(dirs state.Dirs, directory string) error {
	// the placeholder's death signal belongs to the thread that started it
	runtime.LockOSThread()
	place, err := newPlaceholder(directory)
	if err != nil {
		return err
	}
	if err := wait(dirs, directory); err != nil {
		return err // the placeholder ends after us, so that the runtime hears of it
	}
	if place == nil {
		return nil
	}
	_ = place.Process.Kill()
	_ = place.Wait()
	return os.Setenv("GODWIT_INIT_PID", strconv.Itoa(place.Process.Pid)) // criu-shim.c
}

// newPlaceholder is a process in the container's cgroup; nil when nobody asks for it.
func newPlaceholder(directory string) (*exec.Cmd, error) {
	path := filepath.Join(directory, "placeholder")
	asked, err := os.OpenFile(path, os.O_WRONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil
	}
	defer asked.Close()
	place := exec.Command("/proc/self/exe")
	place.Args[0] = "godwit-wait"
	place.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := place.Start(); err != nil {
		return nil, err
	}
	number := []byte(strconv.Itoa(place.Process.Pid))
	if err := os.WriteFile(path+".pid", number, 0o600); err != nil {
		return nil, err
	}
	_, err = asked.Write(append(number, '\n'))
	return place, err
}

func wait(dirs state.Dirs, directory string) error {
	pid := strconv.Itoa(os.Getpid())
	if err := os.WriteFile(filepath.Join(directory, "waiting"), []byte(pid), 0o600); err != nil {
		return err
	}
	dirs.Ring()
	// O_RDONLY without O_CREATE: a gate that is not there is an error, not an open gate.
	gate, err := os.OpenFile(filepath.Join(directory, "gate"), os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer gate.Close()
	if err := failpoint.Reach(dirs, "gate.waiting"); err != nil {
		return err
	}
	word := make([]byte, 1)
	if n, err := gate.Read(word); err != nil || n != 1 {
		return fmt.Errorf("the gate was closed without a word: %w", errClosed)
	}
	if _, err := os.Lstat(filepath.Join(directory, "abort")); err == nil || word[0] != 'g' {
		return errClosed
	}
	return failpoint.Reach(dirs, "gate.open")
}

// environment takes the gate out of CRIU's way and gives it the tools it was shipped with.
func environment(dirs state.Dirs, from []string) []string {
	gateDir := filepath.Join(dirs.Opt, "gate")
	kept := make([]string, 0, len(from))
	for _, entry := range from {
		switch {
		case strings.HasPrefix(entry, "GODWIT_GATE="), strings.HasPrefix(entry, CgroupNamespace+"="):
		case strings.HasPrefix(entry, "PATH="):
			// ours first: CRIU's tar is quicker than the node's
			parts := []string{filepath.Join(dirs.Opt, "criu", "bin")}
			for _, part := range strings.Split(strings.TrimPrefix(entry, "PATH="), ":") {
				if part != gateDir {
					parts = append(parts, part)
				}
			}
			kept = append(kept, "PATH="+strings.Join(parts, ":"))
		default:
			kept = append(kept, entry)
		}
	}
	return kept
}

// Placeholder runs as `godwit-wait`: it is there until it is killed.
func Placeholder() {
	for {
		_ = syscall.Pause()
	}
}
