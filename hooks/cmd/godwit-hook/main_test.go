package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestMain lets the test binary be the command under any name.
func TestMain(m *testing.M) {
	if os.Getenv("GODWIT_TEST_HOOK") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestTheNameTellsWhatItIs(t *testing.T) {
	opt := t.TempDir()
	for path, text := range map[string]string{
		"etc/hook.json": `{"runtime":"` + opt + `/runc"}`,
		"runc":          "#!/bin/sh\necho \"runc $*\"\n",
		"criu/criu":     "#!/bin/sh\necho \"criu $*\"\n",
	} {
		path = filepath.Join(opt, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		argv []string
		cni  string
		code int
		out  string
	}{
		{[]string{"/opt/godwit/bin/godwit-runc", "list"}, "", 0, "runc list\n"},
		{[]string{"godwit-runc", "list"}, "VERSION", 0, "runc list\n"}, // the name comes first
		{[]string{"/opt/godwit/gate/criu", "--version"}, "", 0, "criu --version\n"},
		{[]string{"/usr/lib/cni/godwit"}, "VERSION", 0, `{"cniVersion":`},
		{[]string{"godwit-hook", "version"}, "", 0, "dev\n"},
		{[]string{"godwit-hook"}, "", 0, "godwit-hook is called by others"},
		{[]string{"godwit-hook", "--help"}, "", 0, "godwit-hook is called by others"},
		{[]string{"godwit-hook", "what"}, "", 2, "godwit-hook is called by others"},
	} {
		t.Run(strings.Join(test.argv, " "), func(t *testing.T) {
			child := exec.Command(os.Args[0])
			child.Args = test.argv
			child.Env = append(os.Environ(), "GODWIT_TEST_HOOK=1", "GODWIT_OPT_DIR="+opt,
				"GODWIT_RUN_DIR="+t.TempDir(), "GODWIT_GATE=", "CNI_COMMAND="+test.cni)
			out, _ := child.Output()
			if code := child.ProcessState.ExitCode(); code != test.code || !strings.HasPrefix(string(out), test.out) {
				t.Errorf("exit %d, %s", code, out)
			}
		})
	}
}
