package gate

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"godwit.io/hooks/internal/state"
)

func TestMustWait(t *testing.T) {
	for _, test := range []struct {
		name string
		head []byte
		want bool
	}{
		{"dump", []byte{8, 1, 0x10, 0}, true},
		{"restore", []byte{8, 2}, true},
		{"version", []byte{8, 9}, false},
		{"not a request", []byte{0x12, 1}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_SEQPACKET, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer syscall.Close(pair[0])
			defer syscall.Close(pair[1])
			if err := syscall.Sendto(pair[0], test.head, 0, nil); err != nil {
				t.Fatal(err)
			}
			if got := mustWait(pair[1]); got != test.want {
				t.Errorf("mustWait = %v", got)
			}
			left := make([]byte, 16)
			if n, _, err := syscall.Recvfrom(pair[1], left, 0); err != nil || n != len(test.head) {
				t.Errorf("the request was taken away: %d bytes, %v", n, err)
			}
		})
	}
}

func TestWait(t *testing.T) {
	for _, test := range []struct {
		name, word string
		abort      bool
		open       bool
	}{
		{"go", "g", false, true}, {"no", "x", false, false}, {"aborted", "g", true, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			directory := t.TempDir()
			if err := syscall.Mkfifo(filepath.Join(directory, "gate"), 0o600); err != nil {
				t.Fatal(err)
			}
			if test.abort {
				if err := os.WriteFile(filepath.Join(directory, "abort"), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			done := make(chan error, 1)
			go func() { done <- wait(state.Dirs{Run: t.TempDir()}, directory) }()
			// Opening for writing returns when the gate has been opened for reading.
			fifo, err := os.OpenFile(filepath.Join(directory, "gate"), os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(filepath.Join(directory, "waiting")); err != nil {
				t.Error(err)
			}
			if _, err := fifo.WriteString(test.word); err != nil {
				t.Fatal(err)
			}
			fifo.Close()
			if err := <-done; (err == nil) != test.open {
				t.Errorf("wait: %v", err)
			}
		})
	}
}

func TestNoGateIsNoOpenGate(t *testing.T) {
	if err := wait(state.Dirs{Run: t.TempDir()}, t.TempDir()); err == nil {
		t.Error("passed where there is no gate")
	}
}

func TestEnvironment(t *testing.T) {
	dirs := state.Dirs{Opt: "/opt/godwit"}
	got := strings.Join(environment(dirs, []string{"A=b", "GODWIT_GATE=/g", CgroupNamespace + "=1", "PATH=/opt/godwit/gate:/usr/bin"}), "\n")
	if strings.Contains(got, "GODWIT_GATE=") || strings.Contains(got, CgroupNamespace) || strings.Contains(got, "/opt/godwit/gate:") {
		t.Errorf("the gate is still in the way:\n%s", got)
	}
	if !strings.Contains(got, "/opt/godwit/criu/bin") || !strings.Contains(got, "A=b") {
		t.Errorf("something is lost:\n%s", got)
	}
}
