package cni

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"godwit.io/hooks/internal/state"
)

// criuMark is on the packets by which CRIU rebuilds half-closed sockets (SOCCR_MARK,
// criu/include/net.h); they must pass a closed door.
const criuMark = 0xC114

// rehome replaces the native addresses inside the network namespace and removes the host's routes
// to them. There is no host route to the new ones yet: packets for the original pod must go on
// reaching it until the switch.
func rehome(path, name string, moves []move, door bool) (*state.Network, error) {
	handle, err := netns.GetFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", path, err)
	}
	defer handle.Close()
	pod, err := netlink.NewHandleAt(handle)
	if err != nil {
		return nil, err
	}
	defer pod.Close()
	link, err := pod.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", name, err)
	}
	host, err := netlink.LinkByIndex(link.Attrs().ParentIndex)
	if err != nil {
		return nil, fmt.Errorf("the host's end of %s: %w", name, err)
	}
	if door {
		if err := silence(handle, name); err != nil {
			return nil, fmt.Errorf("closing the door: %w", err)
		}
		if err := closeDoor(handle); err != nil {
			return nil, fmt.Errorf("closing the door: %w", err)
		}
	}
	outside, err := netlink.NewHandle()
	if err != nil {
		return nil, err
	}
	defer outside.Close()
	for _, one := range moves {
		if err := exchange(pod, link, one.gateway, one.ip); err != nil {
			return nil, err
		}
		if err := removeNativeRoute(one.native, host); err != nil {
			return nil, err
		}
		if strings.Contains(one.ip, ":") {
			if err := settle(pod, link); err != nil {
				return nil, err
			}
			if err := settle(outside, host); err != nil {
				return nil, err
			}
		}
	}
	first := moves[0]
	return &state.Network{
		IP: first.ip, NativeIP: first.native, Gateway: first.gateway, Netns: path, Interface: name,
		HostInterface: host.Attrs().Name,
		PodMAC:        link.Attrs().HardwareAddr.String(),
		HostMAC:       host.Attrs().HardwareAddr.String(),
	}, nil
}

// describe changes nothing.
func describe(path, name string, one move) (*state.Network, error) {
	handle, err := netns.GetFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", path, err)
	}
	defer handle.Close()
	pod, err := netlink.NewHandleAt(handle)
	if err != nil {
		return nil, err
	}
	defer pod.Close()
	link, err := pod.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", name, err)
	}
	host, err := netlink.LinkByIndex(link.Attrs().ParentIndex)
	if err != nil {
		return nil, fmt.Errorf("the host's end of %s: %w", name, err)
	}
	return &state.Network{
		IP: one.ip, NativeIP: one.native, Gateway: one.gateway, Netns: path, Interface: name,
		HostInterface: host.Attrs().Name,
		PodMAC:        link.Attrs().HardwareAddr.String(),
		HostMAC:       host.Attrs().HardwareAddr.String(),
	}, nil
}

func exchange(pod *netlink.Handle, link netlink.Link, gateway, ip string) error {
	family, bits := netlink.FAMILY_V4, 32
	address := net.ParseIP(ip)
	if address == nil {
		return fmt.Errorf("%q is no address", ip)
	}
	if address.To4() == nil {
		family, bits = netlink.FAMILY_V6, 128
	}
	routes, err := pod.RouteList(link, family)
	if err != nil {
		return err
	}
	for i := range routes {
		if routes[i].Protocol != unix.RTPROT_KERNEL {
			if err := pod.RouteDel(&routes[i]); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("route %s: %w", routes[i].Dst, err)
			}
		}
	}
	old, err := pod.AddrList(link, family)
	if err != nil {
		return err
	}
	for i := range old {
		if old[i].IP.IsLinkLocalUnicast() {
			continue
		}
		if err := pod.AddrDel(link, &old[i]); err != nil {
			return fmt.Errorf("address %s: %w", old[i].IPNet, err)
		}
	}
	whole := &net.IPNet{IP: address, Mask: net.CIDRMask(bits, bits)}
	fresh := &netlink.Addr{IPNet: whole}
	if family == netlink.FAMILY_V6 {
		fresh.Flags = unix.IFA_F_NODAD // nobody else has it, and a tentative one cannot be bound to
	}
	if err := pod.AddrReplace(link, fresh); err != nil {
		return fmt.Errorf("address %s: %w", whole, err)
	}
	router := net.ParseIP(gateway)
	if router == nil {
		return fmt.Errorf("the network gives no gateway for %s", ip)
	}
	onLink := &netlink.Route{
		LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK,
		Dst: &net.IPNet{IP: router, Mask: net.CIDRMask(bits, bits)}, Src: address,
	}
	if err := pod.RouteReplace(onLink); err != nil {
		return fmt.Errorf("route to the gateway %s: %w", gateway, err)
	}
	standard := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: router, Src: address}
	if err := pod.RouteReplace(standard); err != nil {
		return fmt.Errorf("default route via %s: %w", gateway, err)
	}
	return nil
}

// settle ends the detection of duplicates on a link that only the pod and its node share. An
// address is tentative for up to two seconds, and so long a neighbour is neither asked for nor
// answered (net/ipv6/ndisc.c): a move is quicker than that.
func settle(handle *netlink.Handle, link netlink.Link) error {
	if link.Type() != "veth" {
		return nil
	}
	found, err := handle.AddrList(link, netlink.FAMILY_V6)
	if err != nil {
		return err
	}
	for i := range found {
		if found[i].Flags&unix.IFA_F_TENTATIVE == 0 {
			continue
		}
		again := &netlink.Addr{IPNet: found[i].IPNet, Scope: found[i].Scope, Flags: unix.IFA_F_NODAD}
		if err := handle.AddrDel(link, &found[i]); err != nil {
			return fmt.Errorf("tentative address %s: %w", found[i].IPNet, err)
		}
		if err := handle.AddrAdd(link, again); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("address %s: %w", found[i].IPNet, err)
		}
	}
	return nil
}

// removeNativeRoute removes the host route that ptp makes; bridge makes none.
func removeNativeRoute(native string, host netlink.Link) error {
	address := net.ParseIP(native)
	routes, err := netlink.RouteList(host, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for i := range routes {
		if routes[i].Dst != nil && routes[i].Dst.IP.Equal(address) {
			if err := netlink.RouteDel(&routes[i]); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("route to %s: %w", native, err)
			}
		}
	}
	return nil
}

// silence lets the interface answer no ARP request (arp_ignore of 8, ip-sysctl.rst): on a bridge
// others would learn that the address is here while the original pod still has it.
func silence(handle netns.NsHandle, name string) error {
	result := make(chan error)
	go func() {
		// Never unlocked: a thread that cannot be trusted to be in its namespace ends with this.
		runtime.LockOSThread()
		if err := netns.Set(handle); err != nil {
			result <- err
			return
		}
		// /proc/sys/net shows the network namespace of the thread that opens it
		file := filepath.Join("/proc/sys/net/ipv4/conf", name, "arp_ignore")
		result <- os.WriteFile(file, []byte("8"), 0o644)
	}()
	return <-result
}

// closeDoor makes the table inet godwit_door: nothing passes but loopback and CRIU's own packets.
func closeDoor(handle netns.NsHandle) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	connection, err := nftables.New(nftables.WithNetNSFd(int(handle)))
	if err != nil {
		return err
	}
	family := nftables.TableFamilyINet
	table := connection.AddTable(&nftables.Table{Family: family, Name: "godwit_door"})
	connection.FlushTable(table)
	drop := nftables.ChainPolicyDrop
	for _, side := range []struct {
		name string
		hook *nftables.ChainHook
		meta expr.MetaKey
	}{
		{"input", nftables.ChainHookInput, expr.MetaKeyIIFNAME},
		{"output", nftables.ChainHookOutput, expr.MetaKeyOIFNAME},
	} {
		chain := connection.AddChain(&nftables.Chain{
			Name: side.name, Table: table, Type: nftables.ChainTypeFilter, Hooknum: side.hook,
			Priority: nftables.ChainPriorityRef(-300), Policy: &drop,
		})
		loopback := append([]byte("lo"), make([]byte, unix.IFNAMSIZ-2)...)
		accept(connection, table, chain, expr.MetaKeyMARK, binaryutil.NativeEndian.PutUint32(criuMark))
		accept(connection, table, chain, side.meta, loopback)
	}
	if err := connection.Flush(); err != nil {
		return err
	}
	return nil
}

func accept(connection *nftables.Conn, table *nftables.Table, chain *nftables.Chain, key expr.MetaKey, value []byte) {
	connection.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: value},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}})
}
