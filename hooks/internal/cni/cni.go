// Package cni is the last plugin of the runtime handler's chain. For a successor
// it puts the original address in the place of the native one, behind a closed
// door; for any other pod it passes the result on.
package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"godwit.io/hooks/internal/failpoint"
	"godwit.io/hooks/internal/state"
)

const supported = `{"cniVersion":"1.1.0","supportedVersions":["0.4.0","1.0.0","1.1.0"]}`

type config struct {
	CNIVersion string          `json:"cniVersion"`
	Name       string          `json:"name"`
	PrevResult json.RawMessage `json:"prevResult"`
}

// Main runs one CNI command.
func Main(dirs state.Dirs) int {
	command := os.Getenv("CNI_COMMAND")
	if command == "VERSION" {
		fmt.Println(supported)
		return 0
	}
	input, err := io.ReadAll(os.Stdin)
	if err != nil {
		return report("1.0.0", 5, err)
	}
	conf := config{CNIVersion: "1.0.0"}
	if err := json.Unmarshal(input, &conf); err != nil {
		return report(conf.CNIVersion, 6, err)
	}
	switch command {
	case "ADD":
		result, err := add(dirs, conf)
		if err != nil {
			return report(conf.CNIVersion, 100, err)
		}
		_, _ = os.Stdout.Write(result)
	case "DEL":
		keepHeld(dirs, os.Getenv("CNI_CONTAINERID"))
	case "CHECK", "STATUS", "GC":
		// After the exchange of addresses the main plugin's own CHECK cannot hold; ours has
		// nothing to add.
	default:
		return report(conf.CNIVersion, 4, fmt.Errorf("unknown CNI_COMMAND %q", command))
	}
	return 0
}

func report(version string, code int, err error) int {
	text, _ := json.Marshal(map[string]any{
		"cniVersion": version, "code": code, "msg": "godwit: " + err.Error(),
	})
	fmt.Println(string(text))
	return 1
}

func podUID() string {
	for _, pair := range strings.Split(os.Getenv("CNI_ARGS"), ";") {
		if key, value, found := strings.Cut(pair, "="); found && key == "K8S_POD_UID" {
			return value
		}
	}
	return ""
}

func add(dirs state.Dirs, conf config) ([]byte, error) {
	if len(conf.PrevResult) == 0 || string(conf.PrevResult) == "null" {
		return nil, errors.New("no prevResult: this plugin must come after the one that makes the network")
	}
	uid := podUID()
	expect, err := dirs.Expected(uid)
	if err != nil {
		return nil, err
	}
	if expect == nil {
		return conf.PrevResult, nil
	}
	result, err := readResult(conf.PrevResult)
	if err != nil {
		return nil, err
	}
	if err := failpoint.Reach(dirs, "add.before"); err != nil {
		return nil, err
	}
	if expect.IP == "" { // restored from an archive: the native address is its own
		native, err := result.first()
		if err != nil {
			return nil, err
		}
		network, err := describe(os.Getenv("CNI_NETNS"), os.Getenv("CNI_IFNAME"), native)
		if err != nil {
			return nil, err
		}
		network.SandboxID = os.Getenv("CNI_CONTAINERID")
		return conf.PrevResult, dirs.WriteNetwork(uid, *network)
	}
	moves, err := result.replace(expect.IPs())
	if err != nil {
		return nil, err
	}
	network, err := rehome(os.Getenv("CNI_NETNS"), os.Getenv("CNI_IFNAME"), moves, expect.Door)
	if err != nil {
		return nil, fmt.Errorf("giving %s to the successor %s: %w", strings.Join(expect.IPs(), " and "), uid, err)
	}
	network.SandboxID = os.Getenv("CNI_CONTAINERID")
	if err := dirs.WriteNetwork(uid, *network); err != nil {
		return nil, err
	}
	if err := failpoint.Reach(dirs, "add.after"); err != nil {
		return nil, err
	}
	return result.json()
}

// move is one address that a successor brings along, in the place of the native one of its family.
type move struct {
	ip, native, gateway string
}

// result is a CNI result in which addresses are to be replaced; all else stays as it is, since
// its form depends on the version of CNI.
type result struct {
	whole     map[string]json.RawMessage
	addresses []map[string]json.RawMessage
}

func readResult(raw json.RawMessage) (*result, error) {
	read := &result{}
	if err := json.Unmarshal(raw, &read.whole); err != nil {
		return nil, fmt.Errorf("prevResult: %w", err)
	}
	if len(read.whole["ips"]) > 0 {
		if err := json.Unmarshal(read.whole["ips"], &read.addresses); err != nil {
			return nil, fmt.Errorf("the addresses of prevResult: %w", err)
		}
	}
	if len(read.addresses) == 0 {
		return nil, errors.New("prevResult has no addresses")
	}
	return read, nil
}

func (r *result) at(i int) move {
	native, _, _ := strings.Cut(text(r.addresses[i]["address"]), "/")
	return move{native: native, gateway: text(r.addresses[i]["gateway"])}
}

// first is the pod's native address, by which it is known.
func (r *result) first() (move, error) {
	found := r.at(0)
	if found.native == "" {
		return move{}, errors.New("the first address of prevResult cannot be read")
	}
	found.ip = found.native
	return found, nil
}

// replace puts each of ips in the place of the first native address of its family.
func (r *result) replace(ips []string) ([]move, error) {
	var moves []move
	for _, ip := range ips {
		found := false
		for i := range r.addresses {
			one := r.at(i)
			if one.native == "" || strings.Contains(one.native, ":") != strings.Contains(ip, ":") {
				continue
			}
			address, err := json.Marshal(ip + hostPrefix(ip))
			if err != nil {
				return nil, err
			}
			r.addresses[i]["address"] = address
			one.ip, found = ip, true
			moves = append(moves, one)
			break
		}
		if !found {
			return nil, fmt.Errorf("the network gives no address of the family of %s", ip)
		}
	}
	return moves, nil
}

func (r *result) json() ([]byte, error) {
	var err error
	if r.whole["ips"], err = json.Marshal(r.addresses); err != nil {
		return nil, err
	}
	return json.Marshal(r.whole)
}

// text of a JSON string; "" for anything else.
func text(raw json.RawMessage) string {
	var value string
	_ = json.Unmarshal(raw, &value)
	return value
}

func hostPrefix(ip string) string {
	if strings.Contains(ip, ":") {
		return "/128"
	}
	return "/32"
}

// keepHeld re-labels the reservations of held addresses that belong to the sandbox that goes, so
// that the IPAM's own DEL, which comes after ours, does not find them. host-local's files hold the
// sandbox id in the first line and the interface in the second, separated by CR LF.
func keepHeld(dirs state.Dirs, sandboxID string) {
	if sandboxID == "" {
		return
	}
	for _, held := range dirs.HeldAddresses() {
		for _, directory := range held.IPAMDirs {
			path := filepath.Join(directory, held.IP)
			data, err := os.ReadFile(path)
			if err != nil {
				continue
			}
			owner, rest, _ := strings.Cut(string(data), "\n")
			if strings.TrimSpace(owner) == sandboxID {
				_ = os.WriteFile(path, []byte("godwit-"+held.IP+"\r\n"+rest), 0o600)
			}
		}
	}
}
