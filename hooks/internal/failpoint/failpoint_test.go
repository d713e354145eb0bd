package failpoint

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"godwit.io/hooks/internal/state"
)

func prepare(t *testing.T, action string) (state.Dirs, string) {
	t.Helper()
	dirs := state.Dirs{Run: t.TempDir()}
	if err := os.Mkdir(filepath.Join(dirs.Run, "failpoints"), 0o700); err != nil {
		t.Fatal(err)
	}
	asked := filepath.Join(dirs.Run, "failpoints", "hook.here")
	if err := os.WriteFile(asked, []byte(action), 0o600); err != nil {
		t.Fatal(err)
	}
	return dirs, asked
}

func TestAnErrorComesOnce(t *testing.T) {
	dirs, asked := prepare(t, "error\n")
	if Reach(dirs, "elsewhere") != nil {
		t.Fatal("another place failed")
	}
	if Reach(dirs, "here") == nil {
		t.Fatal("no error")
	}
	if Reach(dirs, "here") != nil {
		t.Fatal("a second error")
	}
	if _, err := os.Stat(asked + ".hit"); err != nil {
		t.Fatal(err)
	}
}

func TestADirectoryThatOthersWriteToIsIgnored(t *testing.T) {
	dirs, asked := prepare(t, "error")
	if err := os.Chmod(filepath.Dir(asked), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := Reach(dirs, "here"); err != nil {
		t.Fatal(err)
	}
}

func TestWhatDoesNotFitIsLeft(t *testing.T) {
	for _, action := range []string{"", "explode", "delay", "delay x", "delay -1", "delay NaN", "crash now"} {
		dirs, asked := prepare(t, action)
		if err := Reach(dirs, "here"); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(asked); err != nil {
			t.Fatalf("%q: %v", action, err)
		}
	}
}

func TestACrashIsASigkill(t *testing.T) {
	if run := os.Getenv("FAILPOINT_RUN"); run != "" {
		_ = Reach(state.Dirs{Run: run}, "here")
		os.Exit(0)
	}
	dirs, _ := prepare(t, "crash")
	child := exec.Command(os.Args[0], "-test.run=TestACrashIsASigkill")
	child.Env = append(os.Environ(), "FAILPOINT_RUN="+dirs.Run)
	_ = child.Run()
	status := child.ProcessState.Sys().(syscall.WaitStatus)
	if !status.Signaled() || status.Signal() != syscall.SIGKILL {
		t.Fatalf("it ended with %v", child.ProcessState)
	}
}
