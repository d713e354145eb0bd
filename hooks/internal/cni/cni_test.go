package cni

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"godwit.io/hooks/internal/state"
)

// TestMain lets the test binary be the plugin, which speaks over its environment, input and output.
func TestMain(m *testing.M) {
	if os.Getenv("GODWIT_TEST_PLUGIN") != "" {
		os.Exit(Main(state.Default()))
	}
	os.Exit(m.Run())
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

func plugin(t *testing.T, dirs state.Dirs, command, uid, input string) (int, string) {
	t.Helper()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), "GODWIT_TEST_PLUGIN=1", "GODWIT_RUN_DIR="+dirs.Run, "GODWIT_OPT_DIR="+dirs.Opt,
		"CNI_COMMAND="+command, "CNI_CONTAINERID=box", "CNI_NETNS=/nowhere/netns", "CNI_IFNAME=eth0",
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=n;K8S_POD_NAME=p;K8S_POD_UID="+uid)
	child.Stdin = strings.NewReader(input)
	out, _ := child.Output()
	return child.ProcessState.ExitCode(), string(out)
}

type failure struct {
	CNIVersion string `json:"cniVersion"`
	Code       int    `json:"code"`
	Msg        string `json:"msg"`
}

const previous = `{ "cniVersion": "1.0.0",  "interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/n"}],
 "ips": [{"address": "10.9.0.2/24", "gateway": "10.9.0.1", "interface": 1}], "routes": [{"dst": "0.0.0.0/0"}], "dns": {} }`

func input(previous string) string {
	return `{"cniVersion":"1.0.0","name":"godwit","type":"godwit","prevResult":` + previous + `}`
}

func TestAddWithoutExpectationPassesVerbatim(t *testing.T) {
	for _, uid := range []string{"ordinary", "", "../expect/other"} {
		t.Run(uid, func(t *testing.T) {
			dirs := state.Dirs{Run: t.TempDir()}
			put(t, filepath.Join(dirs.Run, "expect", "other", "expect.json"), `{"ip":"10.1.2.3"}`)
			if code, out := plugin(t, dirs, "ADD", uid, input(previous)); code != 0 || out != previous {
				t.Errorf("exit %d, %s", code, out)
			}
		})
	}
}

func TestVersion(t *testing.T) {
	code, out := plugin(t, state.Dirs{Run: t.TempDir()}, "VERSION", "", "")
	var answer struct {
		CNIVersion        string   `json:"cniVersion"`
		SupportedVersions []string `json:"supportedVersions"`
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil || code != 0 {
		t.Fatalf("exit %d, %q, %v", code, out, err)
	}
	if want := []string{"0.4.0", "1.0.0", "1.1.0"}; answer.CNIVersion != "1.1.0" || !reflect.DeepEqual(answer.SupportedVersions, want) {
		t.Errorf("%+v", answer)
	}
}

func TestSilentCommands(t *testing.T) {
	for _, command := range []string{"CHECK", "STATUS", "GC", "DEL"} {
		if code, out := plugin(t, state.Dirs{Run: t.TempDir()}, command, "uid", input(previous)); code != 0 || out != "" {
			t.Errorf("%s: exit %d, %s", command, code, out)
		}
	}
}

func TestErrors(t *testing.T) {
	for _, test := range []struct {
		name, command, uid, input, version string
		code                               int
		word                               string
	}{
		{"no JSON", "ADD", "ordinary", `{"cniVersion":`, "1.0.0", 6, "JSON"},
		{"no input", "DEL", "ordinary", "", "1.0.0", 6, "JSON"},
		{"a list", "ADD", "ordinary", "[]", "1.0.0", 6, "array"},
		{"unknown command", "MOVE", "ordinary", input(previous), "1.0.0", 4, "MOVE"},
		{"first in the chain", "ADD", "ordinary", `{"cniVersion":"1.1.0"}`, "1.1.0", 100, "prevResult"},
		{"empty result", "ADD", "ordinary", `{"cniVersion":"0.4.0","prevResult":null}`, "0.4.0", 100, "prevResult"},
		{"record unreadable", "ADD", "broken", input(previous), "1.0.0", 100, "cannot be read"},
		{"record not there", "ADD", "empty", input(previous), "1.0.0", 100, "cannot be read"},
		{"result is no object", "ADD", "successor", input(`[]`), "1.0.0", 100, "prevResult"},
		{"no addresses", "ADD", "successor", input(`{}`), "1.0.0", 100, "no addresses"},
		{"addresses are none", "ADD", "successor", input(`{"ips":[7]}`), "1.0.0", 100, "addresses"},
		{"address is no text", "ADD", "successor", input(`{"ips":[{"address":7}]}`), "1.0.0", 100, "family"},
		{"other family", "ADD", "successor", input(`{"ips":[{"address":"fd00::2/64"}]}`), "1.0.0", 100, "family"},
		{"one family of two", "ADD", "dual", input(previous), "1.0.0", 100, "fd00:1::3"},
		{"no namespace", "ADD", "successor", input(previous), "1.0.0", 100, "/nowhere/netns"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dirs := state.Dirs{Run: t.TempDir()}
			put(t, filepath.Join(dirs.Run, "expect", "successor", "expect.json"), `{"ip":"10.1.2.3","door":true}`)
			put(t, filepath.Join(dirs.Run, "expect", "dual", "expect.json"), `{"ip":"10.1.2.3","more_ips":["fd00:1::3"],"door":true}`)
			put(t, filepath.Join(dirs.Run, "expect", "broken", "expect.json"), "{")
			if err := os.Mkdir(filepath.Join(dirs.Run, "expect", "empty"), 0o700); err != nil {
				t.Fatal(err)
			}
			code, out := plugin(t, dirs, test.command, test.uid, test.input)
			var told failure
			if err := json.Unmarshal([]byte(out), &told); err != nil || code != 1 {
				t.Fatalf("exit %d, %q, %v", code, out, err)
			}
			if told.CNIVersion != test.version || told.Code != test.code || !strings.Contains(told.Msg, test.word) {
				t.Errorf("%+v", told)
			}
			if _, err := os.Lstat(filepath.Join(dirs.Run, "expect", "successor", "network.json")); err == nil {
				t.Error("a network is recorded that there is not")
			}
		})
	}
}

func TestResultIsRewritten(t *testing.T) {
	for _, test := range []struct {
		name, previous string
		ips            []string
		moves          []move
		want           string
	}{
		{"all else stays", previous, []string{"10.1.2.3"}, []move{{"10.1.2.3", "10.9.0.2", "10.9.0.1"}},
			strings.Replace(previous, "10.9.0.2/24", "10.1.2.3/32", 1)},
		{"fields of older versions",
			`{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.9.0.2/24","gateway":"10.9.0.1","interface":0}]}`,
			[]string{"10.1.2.3"}, []move{{"10.1.2.3", "10.9.0.2", "10.9.0.1"}},
			`{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.1.2.3/32","gateway":"10.9.0.1","interface":0}]}`},
		{"the other family stays", `{"ips":[{"address":"fd00::2/64"},{"address":"10.9.0.2/24"}]}`,
			[]string{"10.1.2.3"}, []move{{"10.1.2.3", "10.9.0.2", ""}},
			`{"ips":[{"address":"fd00::2/64"},{"address":"10.1.2.3/32"}]}`},
		{"IPv6", `{"ips":[{"address":"10.9.0.2/24"},{"address":"fd00::2/64","gateway":"fd00::1"}]}`,
			[]string{"fd00:1::3"}, []move{{"fd00:1::3", "fd00::2", "fd00::1"}},
			`{"ips":[{"address":"10.9.0.2/24"},{"address":"fd00:1::3/128","gateway":"fd00::1"}]}`},
		{"both", `{"ips":[{"address":"10.9.0.2/24","gateway":"10.9.0.1"},{"address":"fd00::2/64","gateway":"fd00::1"}]}`,
			[]string{"fd00:1::3", "10.1.2.3"},
			[]move{{"fd00:1::3", "fd00::2", "fd00::1"}, {"10.1.2.3", "10.9.0.2", "10.9.0.1"}},
			`{"ips":[{"address":"10.1.2.3/32","gateway":"10.9.0.1"},{"address":"fd00:1::3/128","gateway":"fd00::1"}]}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			read, err := readResult(json.RawMessage(test.previous))
			if err != nil {
				t.Fatal(err)
			}
			moves, err := read.replace(test.ips)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(moves, test.moves) {
				t.Errorf("%+v", moves)
			}
			out, err := read.json()
			if err != nil {
				t.Fatal(err)
			}
			var got, want any
			if err := json.Unmarshal(out, &got); err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal([]byte(test.want), &want); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("%s\nwant %s", out, test.want)
			}
		})
	}
}

func TestDelKeepsHeldAddressesOfItsOwnSandbox(t *testing.T) {
	for _, test := range []struct{ name, before, after string }{
		{"own", "box\r\neth0", "godwit-10.1.2.3\r\neth0"},
		{"own, without an interface", "box", "godwit-10.1.2.3\r\n"},
		{"of another sandbox", "box2\r\neth0", "box2\r\neth0"},
		{"kept before", "godwit-10.1.2.3\r\neth0", "godwit-10.1.2.3\r\neth0"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dirs := state.Dirs{Run: t.TempDir()}
			ipam := t.TempDir()
			put(t, filepath.Join(dirs.Run, "held", "10.1.2.3"), fmt.Sprintf(
				`{"ip":"10.1.2.3","pod_uid":"uid","ipam_dirs":["/nowhere",%q]}`, ipam))
			put(t, filepath.Join(dirs.Run, "held", "10.1.2.5"), "{")
			put(t, filepath.Join(ipam, "10.1.2.3"), test.before)
			put(t, filepath.Join(ipam, "10.1.2.4"), "box\r\neth0") // nobody holds it
			if code, out := plugin(t, dirs, "DEL", "uid", input(previous)); code != 0 || out != "" {
				t.Errorf("exit %d, %s", code, out)
			}
			for name, want := range map[string]string{"10.1.2.3": test.after, "10.1.2.4": "box\r\neth0"} {
				if got, err := os.ReadFile(filepath.Join(ipam, name)); err != nil || string(got) != want {
					t.Errorf("%s: %q, %v", name, got, err)
				}
			}
			if _, err := os.Lstat(filepath.Join(ipam, "10.1.2.5")); err == nil {
				t.Error("a reservation was made")
			}
		})
	}
}

func TestDelWithoutASandboxTouchesNothing(t *testing.T) {
	dirs, ipam := state.Dirs{Run: t.TempDir()}, t.TempDir()
	put(t, filepath.Join(dirs.Run, "held", "10.1.2.3"), fmt.Sprintf(`{"ip":"10.1.2.3","ipam_dirs":[%q]}`, ipam))
	put(t, filepath.Join(ipam, "10.1.2.3"), "\r\n")
	keepHeld(dirs, "")
	if got, _ := os.ReadFile(filepath.Join(ipam, "10.1.2.3")); string(got) != "\r\n" {
		t.Errorf("%q", got)
	}
}
