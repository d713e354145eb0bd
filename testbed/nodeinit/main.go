// Command nodeinit is process 1 of a testbed node and, called as systemctl, its
// client. It supervises the node's services the way systemd does for a real
// node as far as the product and its tests depend on it: a service that ends is
// started again, stopping a service ends that process only (KillMode=process,
// so containers outlive containerd), orphans are reaped.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"syscall"
	"time"
)

const socketPath = "/run/nodeinit.sock"

// spec is one service of /etc/nodeinit.json.
type spec struct {
	Name string   `json:"name"`
	Argv []string `json:"argv"`
	Env  []string `json:"env"`
}

type service struct {
	spec
	pid     int
	wanted  bool
	started int
}

type supervisor struct {
	mu       sync.Mutex
	ended    *sync.Cond
	services map[string]*service
}

func (s *supervisor) start(svc *service) error {
	log, err := os.OpenFile("/var/log/node/"+svc.Name+".log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	path, err := exec.LookPath(svc.Argv[0])
	if err != nil {
		return err
	}
	null, err := os.Open("/dev/null")
	if err != nil {
		return err
	}
	defer null.Close()
	process, err := os.StartProcess(path, svc.Argv, &os.ProcAttr{
		Dir: "/", Env: append(os.Environ(), svc.Env...),
		Files: []*os.File{null, log, log},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return err
	}
	svc.pid = process.Pid
	svc.started++
	return nil
}

// reap waits for every child: services, and the orphans that the kernel gives to process 1.
func (s *supervisor) reap() {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if err == syscall.ECHILD {
			time.Sleep(50 * time.Millisecond)
			continue
		}
		if err != nil {
			continue
		}
		s.mu.Lock()
		for _, svc := range s.services {
			if svc.pid != pid {
				continue
			}
			svc.pid = 0
			s.ended.Broadcast()
			if svc.wanted {
				svc := svc
				time.AfterFunc(time.Second, func() { s.restartEnded(svc) })
			}
		}
		s.mu.Unlock()
	}
}

func (s *supervisor) restartEnded(svc *service) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if svc.wanted && svc.pid == 0 {
		if err := s.start(svc); err != nil {
			fmt.Fprintln(os.Stderr, svc.Name, err)
		}
	}
}

// stop must be called with the lock held; it returns when the process has ended.
func (s *supervisor) stop(svc *service, signal syscall.Signal) {
	svc.wanted = false
	deadline := time.AfterFunc(10*time.Second, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if svc.pid != 0 && !svc.wanted {
			_ = syscall.Kill(svc.pid, syscall.SIGKILL)
		}
	})
	defer deadline.Stop()
	if svc.pid != 0 {
		_ = syscall.Kill(svc.pid, signal)
	}
	for svc.pid != 0 {
		s.ended.Wait()
	}
}

func (s *supervisor) do(words []string) (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(words) == 1 && words[0] == "status" {
		names := make([]string, 0, len(s.services))
		for name := range s.services {
			names = append(names, name)
		}
		sort.Strings(names)
		var out strings.Builder
		for _, name := range names {
			fmt.Fprintf(&out, "%s %d %d\n", name, s.services[name].pid, s.services[name].started)
		}
		return out.String(), true
	}
	if len(words) == 1 && words[0] == "daemon-reload" {
		return "", true
	}
	if len(words) != 2 {
		return "usage: systemctl start|stop|restart|kill|is-active|status UNIT\n", false
	}
	svc, found := s.services[strings.TrimSuffix(words[1], ".service")]
	if !found {
		return fmt.Sprintf("Unit %s not found.\n", words[1]), false
	}
	switch words[0] {
	case "is-active", "status":
		if svc.pid == 0 {
			return "inactive\n", false
		}
		return "active\n", true
	case "kill":
		if svc.pid != 0 {
			_ = syscall.Kill(svc.pid, syscall.SIGKILL)
		}
		return "", true
	case "stop":
		s.stop(svc, syscall.SIGTERM)
		return "", true
	case "restart":
		s.stop(svc, syscall.SIGTERM)
	case "start":
	default:
		return "unknown command " + words[0] + "\n", false
	}
	svc.wanted = true
	if svc.pid == 0 {
		if err := s.start(svc); err != nil {
			return err.Error() + "\n", false
		}
	}
	return "", true
}

func (s *supervisor) serve(listener net.Listener) {
	for {
		connection, err := listener.Accept()
		if err != nil {
			continue
		}
		go func() {
			defer connection.Close()
			line, err := bufio.NewReader(connection).ReadString('\n')
			if err != nil {
				return
			}
			out, good := s.do(strings.Fields(line))
			code := "1"
			if good {
				code = "0"
			}
			_, _ = connection.Write([]byte(code + out))
		}()
	}
}

func client(words []string) int {
	connection, err := net.Dial("unix", socketPath)
	if err != nil {
		fmt.Fprintln(os.Stderr, "systemctl:", err)
		return 1
	}
	defer connection.Close()
	kept := words[:0]
	for _, word := range words {
		if !strings.HasPrefix(word, "-") {
			kept = append(kept, word)
		}
	}
	fmt.Fprintln(connection, strings.Join(kept, " "))
	answer := make([]byte, 0, 4096)
	buffer := make([]byte, 4096)
	for {
		n, err := connection.Read(buffer)
		answer = append(answer, buffer[:n]...)
		if err != nil {
			break
		}
	}
	if len(answer) == 0 {
		return 1
	}
	fmt.Print(string(answer[1:]))
	return int(answer[0] - '0')
}

func main() {
	if filepath.Base(os.Args[0]) == "systemctl" {
		os.Exit(client(os.Args[1:]))
	}
	text, err := os.ReadFile("/etc/nodeinit.json")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	var specs []spec
	if err := json.Unmarshal(text, &specs); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	s := &supervisor{services: map[string]*service{}}
	s.ended = sync.NewCond(&s.mu)
	_ = os.MkdirAll("/var/log/node", 0o700)
	_ = os.Remove(socketPath)
	listener, err := net.Listen("unix", socketPath)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	go s.reap()
	for _, one := range specs {
		svc := &service{spec: one, wanted: true}
		s.mu.Lock()
		s.services[one.Name] = svc
		if err := s.start(svc); err != nil {
			fmt.Fprintln(os.Stderr, one.Name, err)
			time.AfterFunc(time.Second, func() { s.restartEnded(svc) })
		}
		s.mu.Unlock()
	}
	s.serve(listener)
}
