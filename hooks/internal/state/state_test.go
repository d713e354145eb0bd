package state

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

func run(t *testing.T) Dirs {
	t.Helper()
	dirs := Dirs{Run: t.TempDir(), Opt: t.TempDir()}
	for _, name := range []string{"guard", "expect", "restored", "held"} {
		if err := os.Mkdir(filepath.Join(dirs.Run, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return dirs
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestGuarded(t *testing.T) {
	now := time.Now().Unix()
	boot, err := BootSeconds()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, id, text string
		want           bool
	}{
		{"none", "a", "", false},
		{"in force", "a", fmt.Sprintf(`{"migration":"m","epoch":1,"deadline_boot":%d}`, boot+60), true},
		{"expired", "a", fmt.Sprintf(`{"migration":"m","epoch":1,"deadline_boot":%d}`, boot-60), false},
		{"the clock does not matter", "a", fmt.Sprintf(`{"deadline_boot":%d,"deadline_unix":1}`, boot+60), true},
		{"of an older agent, in force", "a", fmt.Sprintf(`{"deadline_unix":%d}`, now+60), true},
		{"of an older agent, expired", "a", fmt.Sprintf(`{"deadline_unix":%d}`, now-60), false},
		{"unreadable: killing cannot be undone", "a", "{", true},
		{"name that leaves the directory", "../guard/a", `{"deadline_unix":9999999999}`, false},
		{"empty name", "", "", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			dirs := run(t)
			if test.text != "" {
				put(t, filepath.Join(dirs.Run, "guard", "a"), test.text)
			}
			if got := dirs.Guarded(test.id); got != test.want {
				t.Errorf("Guarded(%q) = %v, want %v", test.id, got, test.want)
			}
		})
	}
}

func TestExpected(t *testing.T) {
	dirs := run(t)
	if expect, err := dirs.Expected("ordinary"); expect != nil || err != nil {
		t.Errorf("ordinary pod: %v, %v", expect, err)
	}
	put(t, filepath.Join(dirs.Run, "expect", "uid", "expect.json"),
		`{"migration":"m","epoch":2,"ip":"10.0.0.1","door":true,"containers":{"c":{"dir":"d","images":"i","work":"w"}}}`)
	expect, err := dirs.Expected("uid")
	if err != nil || expect.IP != "10.0.0.1" || !expect.Door || expect.Containers["c"].Images != "i" {
		t.Errorf("successor: %+v, %v", expect, err)
	}
	put(t, filepath.Join(dirs.Run, "expect", "broken", "expect.json"), "no JSON")
	if _, err := dirs.Expected("broken"); err == nil {
		t.Error("a successor whose record cannot be read must not start")
	}
	if err := os.Mkdir(filepath.Join(dirs.Run, "expect", "empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := dirs.Expected("empty"); err == nil {
		t.Error("a successor without a record must not start")
	}
}

func TestASuccessorDoesNotStartWhenTheNodeHasForgottenIt(t *testing.T) {
	dirs := run(t)
	dirs.Lib = t.TempDir()
	if expect, err := dirs.Expected("uid"); expect != nil || err != nil {
		t.Fatalf("ordinary pod: %v, %v", expect, err)
	}
	mark := filepath.Join(dirs.Lib, "successors", "uid")
	put(t, mark, `{"migration":"m","epoch":2}`)
	if expect, err := dirs.Expected("uid"); err == nil || expect != nil {
		t.Errorf("after a restart: %v, %v", expect, err)
	}
	if _, err := dirs.Expected("other"); err != nil {
		t.Error(err)
	}
	if err := os.Remove(mark); err != nil {
		t.Fatal(err)
	}
	if _, err := dirs.Expected("uid"); err != nil {
		t.Errorf("when it has run it is a pod like any other: %v", err)
	}
}

func TestClaimOnce(t *testing.T) {
	dirs := run(t)
	container := Container{Dir: t.TempDir()}
	if err := dirs.Claim(container, "first"); err != nil {
		t.Fatal(err)
	}
	err := dirs.Claim(container, "second")
	if err == nil || !strings.Contains(err.Error(), "first") {
		t.Errorf("second claim: %v", err)
	}
}

func TestRestoredMarks(t *testing.T) {
	dirs := run(t)
	if dirs.Restored("c") {
		t.Error("restored before it was marked")
	}
	if err := dirs.MarkRestored("c", nil); err != nil {
		t.Fatal(err)
	}
	if !dirs.Restored("c") || dirs.Started("c") {
		t.Error("marked restored, not started")
	}
	dirs.MarkStarted("c")
	if !dirs.Started("c") {
		t.Error("not marked started")
	}
	dirs.Forget("c")
	if dirs.Restored("c") || dirs.Started("c") {
		t.Error("marks are left")
	}
}

func TestRingWithoutListener(t *testing.T) {
	run(t).Ring() // must neither block nor fail
}

func TestSafe(t *testing.T) {
	for name, want := range map[string]bool{
		"a": true, "0f1e": true, "b-c_d.e": true, strings.Repeat("a", 128): true,
		"": false, ".": false, "..": false, ".hidden": false, "-x": false, "a/b": false, "../a": false,
		"a b": false, "a\n": false, "a\x00": false, "ä": false, strings.Repeat("a", 129): false,
	} {
		if got := Safe(name); got != want {
			t.Errorf("Safe(%q) = %v", name, got)
		}
	}
}

func TestUnsafeNamesAreNobody(t *testing.T) {
	dirs := run(t)
	put(t, filepath.Join(dirs.Run, "restored", "c"), "")
	if err := os.Mkdir(filepath.Join(dirs.Run, "expect", "uid"), 0o700); err != nil {
		t.Fatal(err)
	}
	if expect, err := dirs.Expected("../expect/uid"); expect != nil || err != nil {
		t.Errorf("%v, %v", expect, err)
	}
	if dirs.Restored("../restored/c") {
		t.Error("restored")
	}
	dirs.Forget("../restored/c")
	if !dirs.Restored("c") {
		t.Error("a mark was removed by a path")
	}
}

func TestClaimNamesTheContainer(t *testing.T) {
	container := Container{Dir: t.TempDir()}
	if err := run(t).Claim(container, "id"); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(container.Dir, "claimed")); err != nil || string(data) != "id" {
		t.Errorf("%q, %v", data, err)
	}
	if err := run(t).Claim(Container{Dir: "/nowhere"}, "id"); err == nil {
		t.Error("claimed in a directory that is not there")
	}
}

func TestRecordsOfTheHook(t *testing.T) {
	dirs := run(t)
	if err := os.Mkdir(filepath.Join(dirs.Run, "expect", "uid"), 0o700); err != nil {
		t.Fatal(err)
	}
	container := Container{Dir: t.TempDir()}
	network := Network{
		IP: "10.1.2.3", NativeIP: "10.9.0.2", Gateway: "10.9.0.1", Netns: "/n", Interface: "eth0",
		HostInterface: "veth1", SandboxID: "box", PodMAC: "02:00:00:00:00:01", HostMAC: "02:00:00:00:00:02",
	}
	result := Result{ContainerID: "id", ExitCode: 1, PID: 7, Error: "why"}
	for _, test := range []struct {
		name, path string
		write      func() error
		into, want any
		keys       string
	}{
		{"network", filepath.Join(dirs.Run, "expect", "uid", "network.json"),
			func() error { return dirs.WriteNetwork("uid", network) }, &Network{}, &network,
			"gateway host_interface host_mac interface ip native_ip netns pod_mac sandbox_id"},
		{"result", filepath.Join(container.Dir, "result.json"),
			func() error { return dirs.WriteResult(container, result) }, &Result{}, &result,
			"container_id error exit_code pid"},
	} {
		t.Run(test.name, func(t *testing.T) {
			for range 2 { // the second replaces the first
				if err := test.write(); err != nil {
					t.Fatal(err)
				}
			}
			if err := readJSON(test.path, test.into); err != nil || !reflect.DeepEqual(test.into, test.want) {
				t.Errorf("%+v, %v", test.into, err)
			}
			named := map[string]any{}
			if err := readJSON(test.path, &named); err != nil {
				t.Fatal(err)
			}
			for _, key := range strings.Fields(test.keys) {
				if _, found := named[key]; !found {
					t.Errorf("the agent looks for %q", key)
				}
				delete(named, key)
			}
			if len(named) > 0 {
				t.Errorf("the contract does not know %v", named)
			}
			info, err := os.Stat(test.path)
			if err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%v, %v", info.Mode(), err)
			}
			if _, err := os.Lstat(test.path + ".part"); err == nil {
				t.Error("the temporary file is left")
			}
		})
	}
	if err := dirs.WriteNetwork("nobody", network); err == nil {
		t.Error("written for a pod that nobody expects")
	}
}

func TestHeldAddresses(t *testing.T) {
	dirs := run(t)
	if got := (Dirs{Run: t.TempDir()}).HeldAddresses(); len(got) != 0 {
		t.Errorf("without a directory: %v", got)
	}
	held := Held{IP: "10.1.2.3", PodUID: "uid", IPAMDirs: []string{"/a", "/b"}}
	text, err := json.Marshal(held)
	if err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(dirs.Run, "held", held.IP), string(text))
	put(t, filepath.Join(dirs.Run, "held", "10.1.2.4"), "{")
	if got := dirs.HeldAddresses(); !reflect.DeepEqual(got, []Held{held}) {
		t.Errorf("%+v", got)
	}
}

func TestRing(t *testing.T) {
	dirs := run(t)
	path := filepath.Join(dirs.Run, "doorbell")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	dirs.Ring() // nobody has it open: neither blocks nor fails
	bell, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer bell.Close()
	dirs.Ring()
	if err := dirs.WriteResult(Container{Dir: t.TempDir()}, Result{}); err != nil {
		t.Fatal(err)
	}
	// Every writer has closed it: all that was written, then the end.
	if heard, err := io.ReadAll(bell); err != nil || string(heard) != "!!" {
		t.Errorf("%q, %v", heard, err)
	}
}

func TestRingDoesNotWaitWhenTheBellIsFull(t *testing.T) {
	dirs := run(t)
	path := filepath.Join(dirs.Run, "doorbell")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := syscall.Open(path, syscall.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	for err == nil {
		_, err = syscall.Write(fd, make([]byte, 4096))
	}
	dirs.Ring()
}

func TestDefaultDirectories(t *testing.T) {
	t.Setenv("GODWIT_RUN_DIR", "")
	t.Setenv("GODWIT_OPT_DIR", "")
	t.Setenv("GODWIT_LIB_DIR", "")
	if got := Default(); got != (Dirs{Run: "/run/godwit", Opt: "/opt/godwit", Lib: "/var/lib/godwit"}) {
		t.Errorf("%+v", got)
	}
	t.Setenv("GODWIT_RUN_DIR", "/r")
	t.Setenv("GODWIT_OPT_DIR", "/o")
	t.Setenv("GODWIT_LIB_DIR", "/l")
	if got := Default(); got != (Dirs{Run: "/r", Opt: "/o", Lib: "/l"}) {
		t.Errorf("%+v", got)
	}
}
