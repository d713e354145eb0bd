package state

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
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
	for _, test := range []struct {
		name, id, text string
		want           bool
	}{
		{"none", "a", "", false},
		{"in force", "a", fmt.Sprintf(`{"migration":"m","epoch":1,"deadline_unix":%d}`, now+60), true},
		{"expired", "a", fmt.Sprintf(`{"migration":"m","epoch":1,"deadline_unix":%d}`, now-60), false},
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
	if err := dirs.MarkRestored("c"); err != nil {
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
