package ociruntime

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"godwit.io/hooks/internal/state"
)

func TestParse(t *testing.T) {
	for _, test := range []struct {
		line       string
		name       string
		positional []string
		root       string
		bundle     string
	}{
		{"--root /r --log /l --log-format json create --bundle /b --pid-file /p ID", "create", []string{"ID"}, "/r", "/b"},
		{"--root=/r create --bundle=/b ID", "create", []string{"ID"}, "/r", "/b"},
		{"--systemd-cgroup --debug kill --all ID 9", "kill", []string{"ID", "9"}, "", ""},
		{"create -b /b --no-pivot ID", "create", []string{"ID"}, "", "/b"},
		{"--root /create start ID", "start", []string{"ID"}, "/create", ""},
		{"exec --process /p --detach ID", "exec", []string{"ID"}, "", ""},
		{"--root /r --rootless auto --criu /c --log /l kill ID KILL", "kill", []string{"ID", "KILL"}, "/r", ""},
		{"--log-format=json --root=/a=b state ID", "state", []string{"ID"}, "/a=b", ""},
		{"--root /r --unknown kill ID", "kill", []string{"ID"}, "/r", ""},
		{"--root /r create --preserve-fds 3 --console-socket /s --no-subreaper --bundle /b ID", "create", []string{"ID"}, "/r", "/b"},
		{"kill -- ID 9", "kill", []string{"ID", "9"}, "", ""},
		{"delete --force ID", "delete", []string{"ID"}, "", ""},
		{"delete -f ID", "delete", []string{"ID"}, "", ""},
		{"list -f json", "list", nil, "", ""},
		{"ps -f json ID", "ps", []string{"ID"}, "", ""},
		{"update -r - ID", "update", []string{"ID"}, "", ""},
		{"--root /r exec -e A=b -u 0:0 ID tool --root /x kill", "exec", []string{"ID", "tool", "--root", "/x", "kill"}, "/r", ""},
		{"--root", "", nil, "", ""},
		{"", "", nil, "", ""},
		{"--version", "", nil, "", ""},
		{"features", "features", nil, "", ""},
	} {
		t.Run(test.line, func(t *testing.T) {
			got := Parse(strings.Fields(test.line))
			if got.Name != test.name || !reflect.DeepEqual(got.Positional, test.positional) {
				t.Errorf("%q %q", got.Name, got.Positional)
			}
			if got.Value("root") != test.root || bundleOrNone(got) != test.bundle {
				t.Errorf("root %q bundle %q", got.Value("root"), got.Value("bundle", "b"))
			}
		})
	}
}

func TestParseKeepsWhatItPassesOn(t *testing.T) {
	got := Parse(strings.Fields("--root /r --log=/l --debug create --bundle /b --no-pivot ID"))
	if want := strings.Fields("--root /r --log=/l --debug"); !reflect.DeepEqual(got.Global, want) {
		t.Errorf("global %q", got.Global)
	}
	if want := strings.Fields("--bundle /b --no-pivot"); !reflect.DeepEqual(got.Options, want) {
		t.Errorf("options %q", got.Options)
	}
	if !got.Has("debug") || got.Has("pivot") || got.ContainerID() != "ID" {
		t.Errorf("%+v", got)
	}
}

func bundleOrNone(call Command) string { return call.Value("bundle", "b") }

// TestMain lets the test binary be the wrapper: it execs, so it must be a process of its own. It
// is what the wrapper starts of itself, too.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case "godwit-keep":
		os.Exit(Keep(state.Default(), os.Args))
	case "godwit-done":
		os.Exit(0)
	}
	if os.Getenv("GODWIT_TEST_WRAPPER") != "" {
		os.Exit(Main(state.Default(), append([]string{"godwit-runc"}, os.Args[1:]...)))
	}
	// The tests are the shim: orphans come to them.
	const prSetChildSubreaper = 36
	if _, _, err := syscall.RawSyscall(syscall.SYS_PRCTL, prSetChildSubreaper, 1, 0); err != 0 {
		panic(err)
	}
	os.Exit(m.Run())
}

type world struct {
	t    *testing.T
	dirs state.Dirs
	log  string
}

// newWorld has a runc that writes down how it was called.
func newWorld(t *testing.T) world {
	t.Helper()
	w := world{t: t, dirs: state.Dirs{Run: t.TempDir(), Opt: t.TempDir()}, log: filepath.Join(t.TempDir(), "log.json")}
	runc := filepath.Join(t.TempDir(), "runc")
	w.put(runc, "#!/bin/sh\necho \"$@\" >> "+w.dirs.Run+"/calls\ncase \"$*\" in *state*) echo '{\"status\":\"running\"}';; *bad*) exit 7;; esac\n")
	if err := os.Chmod(runc, 0o700); err != nil {
		t.Fatal(err)
	}
	w.put(filepath.Join(w.dirs.Opt, "etc", "hook.json"), `{"runtime":"`+runc+`"}`)
	return w
}

func (w world) put(path, text string) {
	w.t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

func (w world) call(words ...string) (int, string) {
	w.t.Helper()
	command := exec.Command(os.Args[0], append([]string{"--log", w.log}, words...)...)
	command.Env = append(os.Environ(), "GODWIT_TEST_WRAPPER=1", "GODWIT_RUN_DIR="+w.dirs.Run, "GODWIT_OPT_DIR="+w.dirs.Opt)
	// a file: what it starts in the background would hold a pipe open
	path := filepath.Join(w.t.TempDir(), "out")
	out, err := os.Create(path)
	if err != nil {
		w.t.Fatal(err)
	}
	defer out.Close()
	command.Stdout = out
	_ = command.Run()
	return command.ProcessState.ExitCode(), w.read(path)
}

func (w world) calls() string {
	data, _ := os.ReadFile(filepath.Join(w.dirs.Run, "calls"))
	return string(data)
}

func (w world) guard(id string) {
	w.put(filepath.Join(w.dirs.Run, "guard", id), fmt.Sprintf(`{"deadline_unix":%d}`, time.Now().Unix()+60))
}

func (w world) bundle(kind, pod, name string) string {
	directory := w.t.TempDir()
	w.put(filepath.Join(directory, "config.json"), fmt.Sprintf(
		`{"annotations":{"io.kubernetes.cri.container-type":%q,"io.kubernetes.cri.sandbox-uid":%q,"io.kubernetes.cri.container-name":%q}}`, kind, pod, name))
	return directory
}

func (w world) expect(pod, name string) string {
	directory := w.t.TempDir()
	w.put(filepath.Join(w.dirs.Run, "expect", pod, "expect.json"), fmt.Sprintf(
		`{"migration":"m","epoch":1,"ip":"10.0.0.1","containers":{%q:{"dir":%q,"images":"/images","work":"/work"}}}`, name, directory))
	return directory
}

func TestAGuardedContainerHasItsProcessWhereverItIs(t *testing.T) {
	w := newWorld(t)
	w.guard("c")
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "c"), 0o700); err != nil {
		t.Fatal(err)
	}
	known := filepath.Join(root, "c", "state.json")
	for _, test := range []struct {
		pid    int
		out    string
		passed bool
	}{{os.Getpid(), fmt.Sprintf("[%d]", os.Getpid()), false}, {1 << 30, "", true}} {
		if err := os.WriteFile(known, []byte(fmt.Sprintf(`{"init_process_pid":%d}`, test.pid)), 0o600); err != nil {
			t.Fatal(err)
		}
		code, out := w.call("--root", root, "ps", "--format", "json", "c")
		if code != 0 || out != test.out || (w.calls() != "") != test.passed {
			t.Errorf("%d: exit %d, %q, runc called: %q", test.pid, code, out, w.calls())
		}
	}
}

func TestGuardedContainer(t *testing.T) {
	for _, test := range []struct {
		words  []string
		code   int
		passed bool
	}{
		{[]string{"kill", "c", "9"}, 0, false},
		{[]string{"kill", "--all", "c", "9"}, 0, false},
		{[]string{"exec", "--process", "/p", "c"}, 1, false},
		{[]string{"update", "c"}, 0, false},
		{[]string{"pause", "c"}, 0, false},
		{[]string{"delete", "--force", "c"}, 1, false},
		{[]string{"delete", "-f", "c"}, 1, false},
		{[]string{"resume", "c"}, 0, false},
		{[]string{"update", "--cpu-shares", "2", "c"}, 0, false},
		{[]string{"delete", "c"}, 0, true},
		{[]string{"state", "c"}, 0, true},
		{[]string{"kill", "other", "9"}, 0, true},
	} {
		t.Run(strings.Join(test.words, " "), func(t *testing.T) {
			w := newWorld(t)
			w.guard("c")
			code, _ := w.call(test.words...)
			if code != test.code || (w.calls() != "") != test.passed {
				t.Errorf("exit %d, runc called: %q", code, w.calls())
			}
			if code != 0 {
				if log, _ := os.ReadFile(w.log); !strings.Contains(string(log), "migrating") {
					t.Errorf("containerd is told %q", log)
				}
			}
		})
	}
}

func TestOrdinaryContainerPasses(t *testing.T) {
	w := newWorld(t)
	bundle := w.bundle("container", "pod", "c")
	if code, _ := w.call("--root", "/r", "create", "--bundle", bundle, "id"); code != 0 {
		t.Fatalf("exit %d", code)
	}
	if want := "--root /r create --bundle " + bundle + " id"; !strings.Contains(w.calls(), want) {
		t.Errorf("runc was called %q", w.calls())
	}
}

func TestSuccessorIsRestoredOnce(t *testing.T) {
	w := newWorld(t)
	directory := w.expect("pod", "c")
	bundle := w.bundle("container", "pod", "c")
	if code, _ := w.call("create", "--bundle", bundle, "--pid-file", "/p", "id"); code != 0 {
		t.Fatalf("exit %d", code)
	}
	for _, word := range []string{"restore", "--lazy-pages", "--tcp-established", "--image-path /images", "--bundle " + bundle, "--pid-file /p"} {
		if !strings.Contains(w.calls(), word) {
			t.Errorf("%q is not in %q", word, w.calls())
		}
	}
	if data, _ := os.ReadFile(filepath.Join(directory, "result.json")); !strings.Contains(string(data), `"exit_code":0`) {
		t.Errorf("result %s", data)
	}
	before := w.calls()
	if code, _ := w.call("start", "id"); code != 0 || w.calls() != before {
		t.Error("start of a restored container must do nothing")
	}
	if code, _ := w.call("create", "--bundle", bundle, "id2"); code == 0 || w.calls() != before {
		t.Error("a successor must not start a second time")
	}
}

func TestStateOfARestoredContainer(t *testing.T) {
	w := newWorld(t)
	if err := w.dirs.MarkRestored("id", nil); err != nil {
		t.Fatal(err)
	}
	if _, out := w.call("state", "id"); !strings.Contains(out, `"created"`) {
		t.Errorf("before start: %s", out)
	}
	w.call("start", "id")
	if _, out := w.call("state", "id"); !strings.Contains(out, `"running"`) {
		t.Errorf("after start: %s", out)
	}
	w.call("delete", "id")
	if w.dirs.Restored("id") {
		t.Error("the mark is left after delete")
	}
}

func TestSuccessorNeverStartsEmpty(t *testing.T) {
	w := newWorld(t)
	w.expect("pod", "c")
	if code, _ := w.call("create", "--bundle", w.bundle("container", "pod", "unknown"), "id"); code == 0 {
		t.Error("a container that does not migrate was created")
	}
	w.put(filepath.Join(w.dirs.Run, "expect", "broken", "expect.json"), "{")
	if code, _ := w.call("create", "--bundle", w.bundle("container", "broken", "c"), "id"); code == 0 {
		t.Error("a successor with an unreadable record was created")
	}
	if w.calls() != "" {
		t.Errorf("runc was called: %q", w.calls())
	}
	if code, _ := w.call("create", "--bundle", w.bundle("sandbox", "pod", ""), "id"); code != 0 {
		t.Error("the sandbox of a successor is an ordinary container")
	}
}

func TestFailedRestore(t *testing.T) {
	w := newWorld(t)
	directory := w.expect("pod", "c")
	if code, _ := w.call("create", "--bundle", w.bundle("container", "pod", "c"), "bad"); code != 7 {
		t.Errorf("exit %d, want runc's own", code)
	}
	if data, _ := os.ReadFile(filepath.Join(directory, "result.json")); !strings.Contains(string(data), `"exit_code":7`) {
		t.Errorf("result %s", data)
	}
	if w.dirs.Restored("bad") {
		t.Error("a failed restore is not a restored container")
	}
}
