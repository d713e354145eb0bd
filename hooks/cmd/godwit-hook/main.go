// Command godwit-hook is the part of Godwit that runs on a node without an agent:
// the OCI runtime wrapper, the CRIU gate and the CNI plugin, told apart by name.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"godwit.io/hooks/internal/cni"
	"godwit.io/hooks/internal/gate"
	"godwit.io/hooks/internal/ociruntime"
	"godwit.io/hooks/internal/state"
)

var version = "dev"

const help = `godwit-hook is called by others, under these names:
  godwit-runc   by containerd or CRI-O, as the OCI runtime of the handler "godwit"
  criu          by runc, as the gate before the real CRIU
  godwit        by the container runtime, as the last CNI plugin of the handler's chain
  godwit-keep, godwit-wait, godwit-done   by itself
  godwit-hook version
See docs/architecture.md for the files it reads and writes.
`

func main() {
	dirs := state.Default()
	switch filepath.Base(os.Args[0]) {
	case "godwit-runc":
		os.Exit(ociruntime.Main(dirs, os.Args))
	case "godwit-keep":
		os.Exit(ociruntime.Keep(dirs, os.Args))
	case "criu":
		os.Exit(gate.Main(dirs, os.Args))
	case "godwit-wait":
		gate.Placeholder()
	case "godwit-done":
		return
	}
	if os.Getenv("CNI_COMMAND") != "" {
		os.Exit(cni.Main(dirs))
	}
	if len(os.Args) == 2 && os.Args[1] == "version" {
		fmt.Println(version)
		return
	}
	fmt.Print(help)
	if len(os.Args) > 1 && os.Args[1] != "help" && os.Args[1] != "--help" {
		os.Exit(2)
	}
}
