package ociruntime

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"godwit.io/hooks/internal/state"
)

// gatedRunc is a `runc restore` that has come to its gate: it tells the number of a placeholder,
// waits for a word on the FIFO `gate`, and ends with that exit code.
func (w world) gatedRunc(placeholder int) {
	w.t.Helper()
	w.runc(fmt.Sprintf(`while [ $# -gt 0 ]; do [ "$1" = --pid-file ] && pidfile=$2; shift; done
[ -p "$GODWIT_GATE/placeholder" ] || { echo no FIFO >&2; exit 9; }
echo %[1]d > "$GODWIT_GATE/placeholder.pid"
echo %[1]d > "$GODWIT_GATE/placeholder"
read pid code < "$GODWIT_GATE/gate"
echo "$pid" > "$pidfile"
exit "$code"`, placeholder))
}

func (w world) openGate(directory, word string) {
	w.t.Helper()
	// for both directions: it does not block when nobody reads
	gate, err := os.OpenFile(filepath.Join(directory, "gate"), os.O_RDWR, 0)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { gate.Close() })
	if _, err := gate.WriteString(word + "\n"); err != nil {
		w.t.Fatal(err)
	}
}

// result waits for the end of a restore in the background.
func (w world) result(directory string) state.Result {
	w.t.Helper()
	path := filepath.Join(directory, "result.json")
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		var result state.Result
		if data, err := os.ReadFile(path); err == nil && json.Unmarshal(data, &result) == nil {
			return result
		}
	}
	w.t.Fatal("no result")
	return state.Result{}
}

// asleep is a process that stands for a placeholder.
func asleep(t *testing.T) *exec.Cmd {
	t.Helper()
	sleeper := exec.Command("sleep", "1000")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sleeper.Process.Kill(); _ = sleeper.Wait() })
	return sleeper
}

func TestCreateReturnsBeforeTheProcessIsThere(t *testing.T) {
	w := newWorld(t)
	directory := w.expect("pod", "c")
	if err := syscall.Mkfifo(filepath.Join(directory, "gate"), 0o600); err != nil {
		t.Fatal(err)
	}
	number := asleep(t).Process.Pid
	w.gatedRunc(number)
	pidFile := filepath.Join(t.TempDir(), "pid")
	code, _ := w.call("create", "--bundle", w.bundle("container", "pod", "c"), "--pid-file", pidFile, "id")
	if code != 0 || w.read(pidFile) != strconv.Itoa(number) {
		t.Fatalf("exit %d, %s", code, w.logged())
	}
	waits := w.dirs.Waits("id")
	if waits == nil || waits.PID != number {
		t.Fatalf("waits: %+v", waits)
	}
	for _, test := range []struct {
		arguments []string
		code      int
	}{
		{[]string{"kill", "id", "9"}, 0},
		{[]string{"kill", "--all", "id", "KILL"}, 0},
		{[]string{"update", "--resources", "-", "id"}, 0},
		{[]string{"pause", "id"}, 0},
		{[]string{"exec", "id", "true"}, 1},
		{[]string{"delete", "--force", "id"}, 1},
		{[]string{"start", "id"}, 0},
	} {
		if code, _ := w.call(test.arguments...); code != test.code || w.calls() != "" {
			t.Errorf("%q: exit %d, runc called: %q", test.arguments, code, w.calls())
		}
	}
	if !strings.Contains(w.logged(), "container is migrating") {
		t.Errorf("nothing is said: %s", w.logged())
	}
	if _, err := os.Stat(filepath.Join(w.dirs.Run, "restored", "id.killed")); err != nil {
		t.Errorf("the agent does not hear that the runtime has given it up: %v", err)
	}
	w.openGate(directory, fmt.Sprintf("%d 0", number))
	if result := w.result(directory); result != (state.Result{ContainerID: "id", PID: number}) {
		t.Errorf("result %+v", result)
	}
	if w.dirs.Waits("id") == nil {
		t.Error("it is stopped until the source has committed, and already unprotected")
	}
}

func TestContainerWithATerminalIsProtectedBeforeItIsReported(t *testing.T) {
	w := newWorld(t)
	directory := w.expect("pod", "c")
	number := asleep(t).Process.Pid
	// the runtime waits for the terminal: no placeholder is asked for
	w.runc(fmt.Sprintf(`while [ $# -gt 0 ]; do [ "$1" = --pid-file ] && pidfile=$2; shift; done
[ -e "$GODWIT_GATE/placeholder" ] && exit 9
echo %d > "$pidfile"`, number))
	pidFile := filepath.Join(t.TempDir(), "pid")
	code, _ := w.call("create", "--bundle", w.bundle("container", "pod", "c"), "--pid-file", pidFile, "--console-socket", "/s", "id")
	if code != 0 {
		t.Fatalf("exit %d, %s", code, w.logged())
	}
	if waits := w.dirs.Waits("id"); waits == nil || waits.PID != number {
		t.Fatalf("waits: %+v", waits)
	}
	for _, words := range [][]string{{"kill", "id", "9"}, {"start", "id"}} {
		if code, _ := w.call(words...); code != 0 || w.calls() != "" {
			t.Errorf("%q: exit %d, runc called: %q", words, code, w.calls())
		}
	}
	if result := w.result(directory); result != (state.Result{ContainerID: "id", PID: number}) {
		t.Errorf("result %+v", result)
	}
}

func TestStateOfAContainerThatWaits(t *testing.T) {
	w := newWorld(t)
	mark(t, w, nil, nil)
	for _, want := range []string{"created", "running"} {
		code, out := w.call("state", "id")
		var value struct {
			ID, Status, Bundle string
			PID                int
		}
		if err := json.Unmarshal([]byte(out), &value); err != nil || code != 0 {
			t.Fatalf("exit %d, %q, %v", code, out, err)
		}
		if value.ID != "id" || value.Status != want || value.PID != os.Getpid() || value.Bundle != "/b" {
			t.Errorf("%+v", value)
		}
		w.dirs.MarkStarted("id")
	}
}

func TestAContainerThatWaitsHasAProcess(t *testing.T) {
	w := newWorld(t)
	mark(t, w, nil, nil)
	code, out := w.call("ps", "--format", "json", "id")
	var numbers []int
	if err := json.Unmarshal([]byte(out), &numbers); err != nil || code != 0 {
		t.Fatalf("exit %d, %q, %v", code, out, err)
	}
	if len(numbers) != 1 || numbers[0] != os.Getpid() {
		t.Errorf("%v", numbers)
	}
}

// mark makes `id` a container that waits.
func mark(t *testing.T, w world, hook, startup []string) {
	t.Helper()
	if err := w.dirs.MarkRestored("id", hook); err != nil {
		t.Fatal(err)
	}
	if err := w.dirs.MarkWaiting("id", state.Waiting{PID: os.Getpid(), Bundle: "/b", Startup: startup}); err != nil {
		t.Fatal(err)
	}
}

func TestHookIsNotRunAgainAndStartupProbePasses(t *testing.T) {
	w := newWorld(t)
	mark(t, w, []string{"touch", "/x"}, []string{"check"})
	exec := func(words ...string) int {
		data, _ := json.Marshal(map[string]any{"args": words})
		process := filepath.Join(t.TempDir(), "process.json")
		w.put(process, string(data))
		pidFile := filepath.Join(t.TempDir(), "pid")
		code, _ := w.call("exec", "--process", process, "--detach", "--pid-file", pidFile, "id")
		if code == 0 && w.calls() == "" {
			pid, err := strconv.Atoi(w.read(pidFile))
			if err != nil {
				t.Fatal(err)
			}
			var status syscall.WaitStatus
			if _, err := syscall.Wait4(pid, &status, 0, nil); err != nil || status != 0 {
				t.Errorf("its process: %v, %v", status, err)
			}
		}
		return code
	}
	for _, test := range []struct {
		words []string
		code  int
	}{
		{[]string{"touch", "/y"}, 1},
		{[]string{"touch", "/x"}, 0},
		{[]string{"touch", "/x"}, 1}, // once: the next start of this container is another one
		{[]string{"check"}, 0},
		{[]string{"check"}, 0},
	} {
		if code := exec(test.words...); code != test.code || w.calls() != "" {
			t.Errorf("%q: exit %d, runc called %q", test.words, code, w.calls())
		}
	}
	mark(t, w, []string{"touch", "/x"}, []string{"check"})
	if err := os.Remove(filepath.Join(w.dirs.Run, "restored", "id.waiting")); err != nil {
		t.Fatal(err)
	}
	if code := exec("touch", "/x"); code != 0 || w.calls() != "" {
		t.Errorf("the hook after the resumption: exit %d, runc called %q", code, w.calls())
	}
	if code := exec("check"); code != 0 || !strings.Contains(w.calls(), "exec") {
		t.Errorf("the probe after the resumption: exit %d, runc called %q", code, w.calls())
	}
}

func TestMarkOfAProcessThatHasEndedHoldsNothing(t *testing.T) {
	w := newWorld(t)
	sleeper := asleep(t)
	if err := w.dirs.MarkWaiting("id", state.Waiting{PID: sleeper.Process.Pid}); err != nil {
		t.Skip(err)
	}
	_ = sleeper.Process.Kill()
	_ = sleeper.Wait()
	if code, _ := w.call("kill", "id", "9"); code != 0 || !strings.Contains(w.calls(), "kill id 9") {
		t.Errorf("exit %d, %q", code, w.calls())
	}
}

func TestRestoreThatFailsInTheBackgroundEndsAsTheContainer(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it chooses a process's number")
	}
	for _, test := range []struct {
		name, word string
	}{
		{"runc fails", "0 4"},
		{"another number", "other 0"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			directory := w.expect("pod", "c")
			if err := syscall.Mkfifo(filepath.Join(directory, "gate"), 0o600); err != nil {
				t.Fatal(err)
			}
			sleeper := asleep(t)
			number := sleeper.Process.Pid
			w.gatedRunc(number)
			// created by a process of its own, as by containerd
			bundle, pidFile := w.bundle("container", "pod", "c"), filepath.Join(t.TempDir(), "pid")
			create := exec.Command(os.Args[0], "--log", w.log, "create", "--bundle", bundle, "--pid-file", pidFile, "id")
			create.Env = append(os.Environ(), "GODWIT_TEST_WRAPPER=1", "GODWIT_RUN_DIR="+w.dirs.Run, "GODWIT_OPT_DIR="+w.dirs.Opt)
			if err := create.Run(); err != nil {
				t.Fatalf("%v: %s", err, w.logged())
			}
			_ = sleeper.Process.Kill() // as the gate does when it opens
			_ = sleeper.Wait()
			word := test.word
			if strings.HasPrefix(word, "other") {
				word = strings.Replace(word, "other", strconv.Itoa(asleep(t).Process.Pid), 1)
			}
			w.openGate(directory, word)
			result := w.result(directory)
			var status syscall.WaitStatus
			if pid, err := syscall.Wait4(number, &status, 0, nil); err != nil || pid != number || status.ExitStatus() != 1 {
				t.Errorf("the runtime hears of %d: status %v, %v", pid, status, err)
			}
			if result.ExitCode == 0 || result.PID != 0 {
				t.Errorf("result %+v", result)
			}
			if w.dirs.Restored("id") || w.dirs.Waits("id") != nil {
				t.Error("it is marked still")
			}
		})
	}
}

func TestDoneContainerEndsAtOnce(t *testing.T) {
	w := newWorld(t)
	w.put(filepath.Join(w.dirs.Run, "expect", "pod", "expect.json"), `{"done":["init"],"containers":{}}`)
	bundle := w.bundle("container", "pod", "init")
	var config map[string]any
	if err := json.Unmarshal([]byte(w.read(filepath.Join(bundle, "config.json"))), &config); err != nil {
		t.Fatal(err)
	}
	config["process"] = map[string]any{"args": []string{"rm", "-r", "/data"}, "cwd": "/data", "user": map[string]int{"uid": 7}}
	config["linux"] = map[string]any{"seccomp": map[string]any{}, "cgroupsPath": "/c"}
	data, _ := json.Marshal(config)
	w.put(filepath.Join(bundle, "config.json"), string(data))
	if code, _ := w.call("create", "--bundle", bundle, "id"); code != 0 || !strings.Contains(w.calls(), " create ") {
		t.Fatalf("exit %d, %q, %s", code, w.calls(), w.logged())
	}
	var changed struct {
		Process struct {
			Args []string
			User struct{ UID int }
		}
		Mounts []struct{ Destination, Source string }
		Linux  map[string]any
	}
	if err := json.Unmarshal([]byte(w.read(filepath.Join(bundle, "config.json"))), &changed); err != nil {
		t.Fatal(err)
	}
	last := changed.Mounts[len(changed.Mounts)-1]
	if strings.Join(changed.Process.Args, " ") != last.Destination || last.Source != w.dirs.Opt+"/bin/godwit-hook" {
		t.Errorf("%+v", changed)
	}
	if changed.Process.User.UID != 7 || changed.Linux["cgroupsPath"] != "/c" || changed.Linux["seccomp"] != nil {
		t.Errorf("%+v", changed)
	}
	if w.dirs.Restored("id") {
		t.Error("it counts as restored")
	}
}
