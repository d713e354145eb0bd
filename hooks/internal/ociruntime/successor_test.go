package ociruntime

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"godwit.io/hooks/internal/state"
)

// runc replaces the runtime of this world by a script.
func (w world) runc(script string) {
	w.t.Helper()
	path := filepath.Join(w.t.TempDir(), "runc")
	w.put(path, "#!/bin/sh\n"+script+"\n")
	if err := os.Chmod(path, 0o700); err != nil {
		w.t.Fatal(err)
	}
	w.put(filepath.Join(w.dirs.Opt, "etc", "hook.json"), fmt.Sprintf(`{"runtime":%q}`, path))
}

func (w world) read(path string) string {
	w.t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		w.t.Fatal(err)
	}
	return string(data)
}

func (w world) logged() string {
	data, _ := os.ReadFile(w.log)
	return string(data)
}

func TestGuardThatDoesNotHoldOrCannotBeRead(t *testing.T) {
	for _, test := range []struct {
		name, guard string
		passed      bool
	}{
		{"expired", fmt.Sprintf(`{"deadline_unix":%d}`, time.Now().Unix()-60), true},
		{"corrupt", `{"deadline_unix":`, false},
		{"empty", "", false},
		{"without a deadline", `{}`, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			w.put(filepath.Join(w.dirs.Run, "guard", "c"), test.guard)
			if code, _ := w.call("kill", "c", "9"); code != 0 || (w.calls() != "") != test.passed {
				t.Errorf("exit %d, runc called: %q", code, w.calls())
			}
		})
	}
}

func TestPassingKeepsArgumentsOutputAndExitCode(t *testing.T) {
	w := newWorld(t)
	w.runc(`printf '<%s>' "$@"; exit 9`)
	code, out := w.call("--root", "/a b", "events", "--stats", "c", "")
	if want := "<--log><" + w.log + "><--root></a b><events><--stats><c><>"; code != 9 || out != want {
		t.Errorf("exit %d, %s", code, out)
	}
}

func TestRuntimeIsUnknown(t *testing.T) {
	for _, test := range []struct{ name, settings, word string }{
		{"no file", "", "which runtime"},
		{"no JSON", "{", "names no runtime"},
		{"no name", "{}", "names no runtime"},
		{"not there", `{"runtime":"/nowhere/runc"}`, "/nowhere/runc"},
		{"itself", `{"runtime":"` + os.Args[0] + `"}`, "which is this program"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			path := filepath.Join(w.dirs.Opt, "etc", "hook.json")
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if test.settings != "" {
				w.put(path, test.settings)
			}
			if code, _ := w.call("list"); code != 1 || !strings.Contains(w.logged(), test.word) {
				t.Errorf("exit %d, %s", code, w.logged())
			}
			var line map[string]string
			if err := json.Unmarshal([]byte(w.logged()), &line); err != nil || line["level"] != "error" || line["msg"] == "" {
				t.Errorf("containerd cannot read %q", w.logged())
			}
		})
	}
}

func TestCreateTellsSuccessorsByAnnotation(t *testing.T) {
	containerd := `{"annotations":{"io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-uid":%q,"io.kubernetes.cri.container-name":"c"}}`
	crio := `{"annotations":{"io.kubernetes.cri-o.ContainerType":"container","io.kubernetes.pod.uid":%q,"io.kubernetes.container.name":"c"}}`
	for _, test := range []struct{ name, config, verb string }{
		{"containerd, successor", fmt.Sprintf(containerd, "pod"), " restore "},
		{"containerd, another pod", fmt.Sprintf(containerd, "other"), " create "},
		{"CRI-O, successor", fmt.Sprintf(crio, "pod"), " restore "},
		{"CRI-O, another pod", fmt.Sprintf(crio, "other"), " create "},
		{"CRI-O, sandbox", `{"annotations":{"io.kubernetes.cri-o.ContainerType":"sandbox","io.kubernetes.pod.uid":"pod"}}`, " create "},
		{"no pod", `{"annotations":{"io.kubernetes.cri.container-type":"container"}}`, " create "},
		{"uid that leaves the directory", fmt.Sprintf(containerd, "../expect/pod"), " create "},
		{"no annotations", `{}`, " create "},
		{"no JSON: runc says it better", `{`, " create "},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			directory := w.expect("pod", "c")
			bundle := t.TempDir()
			w.put(filepath.Join(bundle, "config.json"), test.config)
			if code, _ := w.call("create", "--bundle="+bundle, "id"); code != 0 || !strings.Contains(w.calls(), test.verb) {
				t.Fatalf("exit %d, %q, %s", code, w.calls(), w.logged())
			}
			claimed, _ := os.ReadFile(filepath.Join(directory, "claimed"))
			if restored := test.verb == " restore "; (string(claimed) == "id") != restored || w.dirs.Restored("id") != restored {
				t.Errorf("claimed by %q", claimed)
			}
		})
	}
}

func TestRestoreCommandAndEnvironment(t *testing.T) {
	w := newWorld(t)
	// It answers as runc does: with a pid in the pid file.
	w.runc(`printf '%s\n' "$@" > "$GODWIT_RUN_DIR/calls"
echo "$PATH|$GODWIT_GATE|$CRIU_CONFIG_FILE" > "$GODWIT_RUN_DIR/environment"
while [ $# -gt 0 ]; do [ "$1" = --pid-file ] && echo 4711 > "$2"; shift; done`)
	directory, bundle := w.expect("pod", "c"), w.bundle("container", "pod", "c")
	pidFile := filepath.Join(t.TempDir(), "pid")
	code, _ := w.call("--root", "/r", "--systemd-cgroup", "create", "--bundle", bundle, "--pid-file="+pidFile,
		"--console-socket", "/s", "--preserve-fds", "2", "--no-pivot", "id")
	if code != 0 {
		t.Fatalf("exit %d, %s", code, w.logged())
	}
	want := []string{"--log", w.log, "--root", "/r", "--systemd-cgroup", "restore", "--detach", "--lazy-pages",
		"--tcp-established", "--file-locks", "--manage-cgroups-mode", "ignore", "--image-path", "/images",
		"--work-path", "/work", "--bundle", bundle, "--pid-file", pidFile, "--console-socket", "/s",
		"--preserve-fds", "2", "--no-pivot", "id"}
	if got := strings.Split(strings.TrimSpace(w.calls()), "\n"); strings.Join(got, "\x00") != strings.Join(want, "\x00") {
		t.Errorf("runc was called %q\nwant %q", got, want)
	}
	wanted := fmt.Sprintf("%s/gate:%s|%s|%s/criu.conf\n", w.dirs.Opt, os.Getenv("PATH"), directory, directory)
	if got := w.read(filepath.Join(w.dirs.Run, "environment")); got != wanted {
		t.Errorf("environment %q, want %q", got, wanted)
	}
	var result state.Result
	if err := json.Unmarshal([]byte(w.read(filepath.Join(directory, "result.json"))), &result); err != nil {
		t.Fatal(err)
	}
	if want := (state.Result{ContainerID: "id", PID: 4711}); result != want {
		t.Errorf("result %+v, want %+v", result, want)
	}
}

func TestCgroupNamespaceOfTheContainersOwn(t *testing.T) {
	for config, want := range map[string]bool{
		`{"linux":{"namespaces":[{"type":"pid"},{"type":"cgroup"}]}}`:             true,
		`{"linux":{"namespaces":[{"type":"cgroup","path":"/proc/1/ns/cgroup"}]}}`: false,
		`{"linux":{"namespaces":[{"type":"pid"}]}}`:                               false,
		`{}`: false,
		`{`:  false,
	} {
		directory := t.TempDir()
		if err := os.WriteFile(filepath.Join(directory, "config.json"), []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := bundleFor(Parse([]string{"create", "--bundle", directory, "id"})).ownCgroupNamespace(); got != want {
			t.Errorf("%s: %v", config, got)
		}
	}
	if bundleFor(Parse([]string{"create", "--bundle", t.TempDir(), "id"})).ownCgroupNamespace() {
		t.Error("without a config.json")
	}
}

func TestNotRestoredWhereItWouldLoseItsLabel(t *testing.T) {
	w := newWorld(t)
	directory := w.expect("pod", "c")
	bundle := w.bundle("container", "pod", "c")
	config := filepath.Join(bundle, "config.json")
	w.put(config, strings.Replace(w.read(config), "{", `{"process":{"selinuxLabel":"u:r:container_t:s0:c1,c2"},`, 1))
	if code, _ := w.call("create", "--bundle", bundle, "id"); code == 0 || w.calls() != "" {
		t.Errorf("exit %d, runc was called: %q", code, w.calls())
	}
	for _, said := range []string{w.logged(), w.read(filepath.Join(directory, "result.json"))} {
		if !strings.Contains(said, "container_t:s0:c1,c2") {
			t.Errorf("the label is not named: %q", said)
		}
	}
}

// A kubelet that has lost a container (its requests were cancelled) makes another one.
func TestNotStartedBesideItsLivingProcess(t *testing.T) {
	w := newWorld(t)
	process := exec.Command("sleep", "100")
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	bundle := w.bundle("container", "pod", "c")
	mine := state.Moved{PodUID: "pod", Container: "c", PID: process.Process.Pid}
	if err := os.MkdirAll(filepath.Join(w.dirs.Run, "restored"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := w.dirs.MarkMoved("id", mine); err != nil {
		t.Fatal(err)
	}
	w.dirs.Forget("id")
	code, _ := w.call("create", "--bundle", bundle, "id2")
	if code == 0 || strings.Contains(w.calls(), "create") || !strings.Contains(w.logged(), fmt.Sprintf("runs as process %d", mine.PID)) {
		t.Fatalf("exit %d, %q, %s", code, w.calls(), w.logged())
	}
	for _, other := range []string{w.bundle("container", "pod", "d"), w.bundle("container", "other", "c")} {
		if code, _ := w.call("create", "--bundle", other, "id3"); code != 0 {
			t.Errorf("exit %d for another one, %s", code, w.logged())
		}
	}
	_ = process.Process.Kill()
	_ = process.Wait()
	w.dirs.Forget("another")
	if left, _ := filepath.Glob(filepath.Join(w.dirs.Run, "restored", "*.moved")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	if code, _ := w.call("create", "--bundle", bundle, "id2"); code != 0 {
		t.Errorf("exit %d after its end, %s", code, w.logged())
	}
}

func TestFailedRestoreSaysWhy(t *testing.T) {
	w := newWorld(t)
	work, directory := t.TempDir(), t.TempDir()
	w.runc(fmt.Sprintf(`printf '(1) all is well\n(2) Error (criu/x.c): no such file\n' > %s/restore.log; exit 3`, work))
	w.put(filepath.Join(w.dirs.Run, "expect", "pod", "expect.json"), fmt.Sprintf(
		`{"containers":{"c":{"dir":%q,"images":"/images","work":%q}}}`, directory, work))
	if code, _ := w.call("create", "--bundle", w.bundle("container", "pod", "c"), "id"); code != 3 {
		t.Errorf("exit %d, want runc's own", code)
	}
	var result state.Result
	if err := json.Unmarshal([]byte(w.read(filepath.Join(directory, "result.json"))), &result); err != nil {
		t.Fatal(err)
	}
	if want := (state.Result{ContainerID: "id", ExitCode: 3, Error: "(2) Error (criu/x.c): no such file"}); result != want {
		t.Errorf("result %+v", result)
	}
	// It had its one chance: the images may be half used.
	if code, _ := w.call("create", "--bundle", w.bundle("container", "pod", "c"), "again"); code != 1 ||
		!strings.Contains(w.logged(), "container id has claimed the restore before") {
		t.Errorf("exit %d, %s", code, w.logged())
	}
}

func TestIdThatIsNoName(t *testing.T) {
	w := newWorld(t)
	directory := w.expect("pod", "c")
	if code, _ := w.call("create", "--bundle", w.bundle("container", "pod", "c"), "../id"); code != 1 || w.calls() != "" {
		t.Errorf("exit %d, %q", code, w.calls())
	}
	if _, err := os.Lstat(filepath.Join(directory, "claimed")); err == nil {
		t.Error("it has used up the one restore")
	}
}

func TestStartAndStateOfOrdinaryContainers(t *testing.T) {
	w := newWorld(t)
	if code, _ := w.call("start", "id"); code != 0 || !strings.Contains(w.calls(), "start id") {
		t.Errorf("exit %d, %q", code, w.calls())
	}
	if _, out := w.call("state", "id"); out != "{\"status\":\"running\"}\n" {
		t.Errorf("state %s", out)
	}
}

func TestStateBeforeStartKeepsTheRest(t *testing.T) {
	w := newWorld(t)
	if err := w.dirs.MarkRestored("id", nil); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		script, status string
		code           int
	}{
		{`echo '{"status":"running","pid":7}'`, "created", 0},
		{`echo '{"status":"stopped","pid":7}'`, "stopped", 0},
		{`exit 5`, "", 5},
	} {
		w.runc(test.script)
		code, out := w.call("state", "id")
		var value struct {
			Status string
			PID    int
		}
		if out != "" {
			if err := json.Unmarshal([]byte(out), &value); err != nil || value.PID != 7 {
				t.Errorf("%s: %q, %v", test.script, out, err)
			}
		}
		if code != test.code || value.Status != test.status {
			t.Errorf("%s: exit %d, status %q", test.script, code, value.Status)
		}
	}
}
