package ociruntime

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"godwit.io/hooks/internal/state"
)

// The kubelet creates a container only when the one before it is created and started. So `create`
// of a restored container returns before there is a process: a placeholder in the container's
// cgroup has the number that the process will get (internal/gate), and a keeper goes on with the
// restore. The runtime sees one process from the beginning.

const placeholder = "placeholder" // a FIFO in the container's directory: the gate says the number

// create starts the restore and returns when it waits at the gate, or has failed.
func create(dirs state.Dirs, real string, call Command, container state.Container) int {
	id := call.ContainerID()
	if err := dirs.Claim(container, id); err != nil {
		return fail(call, err)
	}
	if err := dirs.MarkRestored(id, container.PostStart); err != nil {
		return fail(call, err)
	}
	if call.Value("console-socket") != "" {
		// the runtime waits for the terminal, which only the process itself can send
		return restore(dirs, real, call, container, nil)
	}
	code, err := inBackground(dirs, call, container)
	if err != nil {
		dirs.Forget(id)
		return fail(call, err)
	}
	return code
}

func inBackground(dirs state.Dirs, call Command, container state.Container) (int, error) {
	path := filepath.Join(container.Dir, placeholder)
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		return 1, err
	}
	// for both, so that it is no end when nobody has it open
	fifo, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return 1, err
	}
	defer fifo.Close()
	lease, ours, err := os.Pipe()
	if err != nil {
		return 1, err
	}
	defer ours.Close()
	keeper := exec.Command("/proc/self/exe")
	keeper.Args = append([]string{"godwit-keep"}, call.arguments...)
	keeper.Stdin, keeper.Stdout, keeper.Stderr = os.Stdin, os.Stdout, os.Stderr
	keeper.ExtraFiles = []*os.File{lease}
	keeper.Env = append(os.Environ(), "GODWIT_RUN_DIR="+dirs.Run, "GODWIT_OPT_DIR="+dirs.Opt, "GODWIT_LIB_DIR="+dirs.Lib)
	keeper.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = keeper.Start()
	lease.Close()
	if err != nil {
		return 1, err
	}
	ended := make(chan int, 1)
	go func() {
		_ = keeper.Wait()
		ended <- keeper.ProcessState.ExitCode()
	}()
	told := make(chan string, 1)
	go func() {
		if line, err := bufio.NewReader(fifo).ReadString('\n'); err == nil {
			told <- strings.TrimSpace(line)
		}
	}()
	select {
	case code := <-ended:
		return code, nil
	case text := <-told:
		pid, err := strconv.Atoi(text)
		if err != nil {
			return 1, fmt.Errorf("placeholder %q: %w", text, err)
		}
		waits := state.Waiting{PID: pid, Bundle: bundleOf(call), Startup: container.Startup}
		if err := dirs.MarkWaiting(call.ContainerID(), waits); err != nil {
			return 1, err
		}
		if err := os.WriteFile(call.Value("pid-file"), []byte(text), 0o600); err != nil {
			return 1, err
		}
		_, err = ours.Write([]byte{'k'})
		return 0, err
	}
}

// Keep runs as `godwit-keep` with the arguments of `create`, and the lease as descriptor 3: a word
// on it says that the runtime has taken the placeholder for the container.
func Keep(dirs state.Dirs, argv []string) int {
	call := Parse(argv[1:])
	real, err := realRuntime(dirs)
	if err != nil {
		return fail(call, err)
	}
	expected, err := expectedOf(dirs, call)
	if err != nil || expected == nil || expected.done {
		return fail(call, fmt.Errorf("nothing to restore: %w", err))
	}
	return restore(dirs, real, call, expected.container, os.NewFile(3, "lease"))
}

// placeholderOf is 0 when the runtime was told no number.
func placeholderOf(container state.Container) int {
	data, err := os.ReadFile(filepath.Join(container.Dir, placeholder+".pid"))
	if err != nil {
		return 0
	}
	pid, _ := strconv.Atoi(strings.TrimSpace(string(data)))
	return pid
}

// reportExit makes a process of this number end as a child of our parent, the runtime: it waits
// for the end of a placeholder that has made room for a process which then did not come.
func reportExit(pid int) {
	if _, err := os.Lstat(filepath.Join("/proc", strconv.Itoa(pid))); err == nil {
		return // it is there still, and ends by itself
	}
	const (
		cloneParent = 0x8000 // linux/sched.h
		sysClone3   = 435    // the same on all architectures
	)
	number := [1]int32{int32(pid)}
	arguments := [11]uint64{0: cloneParent, 8: uint64(uintptr(unsafe.Pointer(&number))), 9: 1}
	child, _, failed := syscall.RawSyscall(sysClone3, uintptr(unsafe.Pointer(&arguments)), unsafe.Sizeof(arguments), 0)
	for child == 0 && failed == 0 {
		_, _, _ = syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 1, 0, 0)
	}
}
