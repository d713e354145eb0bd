// Package failpoint makes this binary fail where a test tells it to. It acts on files below
// /run/godwit/failpoints, a directory that exists only where an agent runs with failpoints
// enabled; see godwit_api/failpoints.py for the actions.
package failpoint

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"godwit.io/hooks/internal/state"
)

const step = 20 * time.Millisecond

// Reach carries out what a test has asked for at name, once. An action that does not fit is left
// where it is.
func Reach(dirs state.Dirs, name string) error {
	directory := filepath.Join(dirs.Run, "failpoints")
	if !trusted(directory) {
		return nil
	}
	asked := filepath.Join(directory, "hook."+name)
	data, err := os.ReadFile(asked)
	if err != nil {
		return nil
	}
	action, argument, _ := strings.Cut(strings.TrimSpace(string(data)), " ")
	seconds, err := strconv.ParseFloat(argument, 64)
	known := argument == "" && (action == "crash" || action == "error" || action == "pause")
	if !known && (action != "delay" || err != nil || !(seconds >= 0 && seconds < 1000)) {
		return nil
	}
	if os.Rename(asked, asked+".hit") != nil {
		return nil
	}
	switch action {
	case "crash":
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	case "error":
		return fmt.Errorf("failpoint %s", name)
	case "delay":
		time.Sleep(time.Duration(seconds * float64(time.Second)))
	case "pause":
		for {
			if _, err := os.Lstat(asked + ".go"); err == nil {
				break
			}
			time.Sleep(step)
		}
	}
	return nil
}

// trusted: only its owner, root or we, can have written there.
func trusted(directory string) bool {
	var found syscall.Stat_t
	if syscall.Lstat(directory, &found) != nil {
		return false
	}
	owned := found.Uid == 0 || int(found.Uid) == os.Geteuid()
	return found.Mode&syscall.S_IFMT == syscall.S_IFDIR && owned && found.Mode&0o022 == 0
}
