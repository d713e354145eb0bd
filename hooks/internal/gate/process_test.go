package gate

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"godwit.io/hooks/internal/state"
)

// TestMain lets the test binary be the gate: it becomes the real CRIU, so it must be a process.
func TestMain(m *testing.M) {
	if os.Args[0] == "godwit-wait" {
		Placeholder()
	}
	if os.Getenv("GODWIT_TEST_GATE") != "" {
		os.Exit(Main(state.Default(), append([]string{"criu"}, os.Args[1:]...)))
	}
	os.Exit(m.Run())
}

// called is one `criu swrk 3` as runc starts it.
type called struct {
	t         *testing.T
	dirs      state.Dirs
	directory string
	command   *exec.Cmd
	out       io.ReadCloser
	errors    strings.Builder
}

// newCall has a real CRIU that says how it was called.
func newCall(t *testing.T) *called {
	t.Helper()
	c := &called{t: t, dirs: state.Dirs{Run: t.TempDir(), Opt: t.TempDir()}, directory: t.TempDir()}
	if err := os.Mkdir(filepath.Join(c.dirs.Opt, "criu"), 0o700); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\necho \"real $* gate=$GODWIT_GATE\"\nexit 5\n"
	if err := os.WriteFile(filepath.Join(c.dirs.Opt, "criu", "criu"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *called) fifo() string {
	c.t.Helper()
	path := filepath.Join(c.directory, "gate")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		c.t.Fatal(err)
	}
	return path
}

// start runs it with a request on descriptor 3; the test holds the other end.
func (c *called) start(gate string, request []byte, words ...string) {
	c.t.Helper()
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = syscall.Close(pair[0]) })
	if err := syscall.Sendto(pair[0], request, 0, nil); err != nil {
		c.t.Fatal(err)
	}
	if len(words) == 0 {
		words = []string{"swrk", "3"}
	}
	remote := os.NewFile(uintptr(pair[1]), "request")
	defer remote.Close()
	c.command = exec.Command(os.Args[0], words...)
	c.command.ExtraFiles = []*os.File{remote}
	c.command.Stderr = &c.errors
	c.command.Env = append(os.Environ(), "GODWIT_TEST_GATE=1", "GODWIT_GATE="+gate,
		"GODWIT_RUN_DIR="+c.dirs.Run, "GODWIT_OPT_DIR="+c.dirs.Opt)
	if c.out, err = c.command.StdoutPipe(); err != nil {
		c.t.Fatal(err)
	}
	if err := c.command.Start(); err != nil {
		c.t.Fatal(err)
	}
}

func (c *called) end() (int, string) {
	c.t.Helper()
	out, err := io.ReadAll(c.out)
	if err != nil {
		c.t.Fatal(err)
	}
	_ = c.command.Wait()
	return c.command.ProcessState.ExitCode(), string(out)
}

func TestWhoPassesAtOnce(t *testing.T) {
	restore := []byte{8, 2}
	for _, test := range []struct {
		name    string
		gated   bool
		request []byte
		words   []string
	}{
		{"version", true, []byte{8, 9}, nil},
		{"check of features", true, []byte{8, 12}, nil},
		{"restore without a gate", false, restore, nil},
		{"no swrk", true, restore, []string{"--version"}},
		{"swrk without a descriptor", true, restore, []string{"swrk"}},
		{"swrk with no number", true, restore, []string{"swrk", "x"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newCall(t)
			c.fifo()
			gate := ""
			if test.gated {
				gate = c.directory
			}
			c.start(gate, test.request, test.words...)
			code, out := c.end()
			words := "swrk 3"
			if test.words != nil {
				words = strings.Join(test.words, " ")
			}
			if want := fmt.Sprintf("real %s gate=\n", words); code != 5 || out != want {
				t.Errorf("exit %d, %q, %s", code, out, &c.errors)
			}
			if _, err := os.Lstat(filepath.Join(c.directory, "waiting")); err == nil {
				t.Error("it waited")
			}
		})
	}
}

func TestDumpAndRestoreWait(t *testing.T) {
	for _, test := range []struct {
		name    string
		request byte
		word    string
		abort   bool
		passed  bool
	}{
		{"dump, go", requestDump, "g", false, true},
		{"restore, go", requestRestore, "g", false, true},
		{"dump, no", requestDump, "x", false, false},
		{"restore, no", requestRestore, "x", false, false},
		{"closed without a word", requestRestore, "", false, false},
		{"aborted meanwhile", requestRestore, "g", true, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newCall(t)
			fifo := c.fifo()
			bell := filepath.Join(c.dirs.Run, "doorbell")
			if err := syscall.Mkfifo(bell, 0o600); err != nil {
				t.Fatal(err)
			}
			heard, err := os.OpenFile(bell, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer heard.Close()
			c.start(c.directory, []byte{8, test.request, 0x10, 0})
			if _, err := heard.Read(make([]byte, 1)); err != nil { // that it waits is what it rings for
				t.Fatal(err)
			}
			waiting, err := os.ReadFile(filepath.Join(c.directory, "waiting"))
			if err != nil || string(waiting) != fmt.Sprint(c.command.Process.Pid) {
				t.Errorf("waiting %q, %v", waiting, err)
			}
			if test.abort {
				if err := os.WriteFile(filepath.Join(c.directory, "abort"), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			// Opening for writing returns when the gate has been opened for reading.
			writer, err := os.OpenFile(fifo, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := writer.WriteString(test.word); err != nil {
				t.Fatal(err)
			}
			writer.Close()
			code, out := c.end()
			if test.passed && (code != 5 || out != "real swrk 3 gate=\n") {
				t.Errorf("exit %d, %q, %s", code, out, &c.errors)
			}
			if !test.passed && (code != 1 || out != "" || !strings.Contains(c.errors.String(), c.directory)) {
				t.Errorf("exit %d, %q, %s", code, out, &c.errors)
			}
		})
	}
}

func TestMissingGateRefuses(t *testing.T) {
	for _, test := range []struct {
		name string
		gate func(c *called) string
	}{
		{"no FIFO", func(c *called) string { return c.directory }},
		{"no directory", func(c *called) string { return filepath.Join(c.directory, "gone") }},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newCall(t)
			c.start(test.gate(c), []byte{8, requestRestore})
			if code, out := c.end(); code != 1 || out != "" {
				t.Errorf("exit %d, %q", code, out)
			}
		})
	}
}

func TestNoRealCRIU(t *testing.T) {
	c := newCall(t)
	if err := os.Remove(filepath.Join(c.dirs.Opt, "criu", "criu")); err != nil {
		t.Fatal(err)
	}
	c.start("", []byte{8, 9})
	if code, _ := c.end(); code != 127 || !strings.Contains(c.errors.String(), "criu/criu") {
		t.Errorf("exit %d, %s", code, &c.errors)
	}
}

func TestEnvironmentFindsOurToolsFirst(t *testing.T) {
	got := environment(state.Dirs{Opt: "/o"}, []string{"PATH=/o/gate:/usr/bin:/bin", "GODWIT_GATE=/g", "CRIU_CONFIG_FILE=/c"})
	if want := "PATH=/o/criu/bin:/usr/bin:/bin CRIU_CONFIG_FILE=/c"; strings.Join(got, " ") != want {
		t.Errorf("%q", got)
	}
}

// TestPlaceholderHasTheNumberUntilTheGateOpens: CRIU is told the number, and it is free then.
func TestPlaceholderHasTheNumberUntilTheGateOpens(t *testing.T) {
	for _, test := range []struct {
		name, word string
		passed     bool
	}{{"go", "g", true}, {"no", "x", false}} {
		t.Run(test.name, func(t *testing.T) {
			c := newCall(t)
			script := "#!/bin/sh\necho \"$GODWIT_INIT_PID $(test -e /proc/$GODWIT_INIT_PID && echo taken)\"\nexit 5\n"
			if err := os.WriteFile(filepath.Join(c.dirs.Opt, "criu", "criu"), []byte(script), 0o700); err != nil {
				t.Fatal(err)
			}
			path := c.fifo()
			asked := filepath.Join(c.directory, "placeholder")
			if err := syscall.Mkfifo(asked, 0o600); err != nil {
				t.Fatal(err)
			}
			fifo, err := os.OpenFile(asked, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer fifo.Close()
			c.start(c.directory, []byte{8, requestRestore, 0x10, 0})
			var number int
			if _, err := fmt.Fscan(fifo, &number); err != nil {
				t.Fatal(err)
			}
			if noted, _ := os.ReadFile(asked + ".pid"); string(noted) != fmt.Sprint(number) {
				t.Errorf("noted %q, told %d", noted, number)
			}
			if err := syscall.Kill(number, 0); err != nil {
				t.Errorf("process %d: %v", number, err)
			}
			// Opening for writing returns when the gate has been opened for reading.
			gate, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := gate.WriteString(test.word); err != nil {
				t.Fatal(err)
			}
			gate.Close()
			code, out := c.end()
			if test.passed && (code != 5 || out != fmt.Sprintf("%d \n", number)) {
				t.Errorf("exit %d, %q, want %d", code, out, number)
			}
			if !test.passed && (code != 1 || out != "") {
				t.Errorf("exit %d, %q", code, out)
			}
		})
	}
}
