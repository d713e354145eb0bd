// Package ociruntime stands before runc: it guards processes that migrate, and
// turns the creation of a successor's container into a restore.
package ociruntime

import "strings"

var commands = map[string]bool{
	"checkpoint": true, "create": true, "delete": true, "events": true, "exec": true,
	"features": true, "kill": true, "list": true, "pause": true, "ps": true, "restore": true,
	"resume": true, "run": true, "spec": true, "start": true, "state": true, "update": true,
}

// Options of runc that take a value as the next argument.
var withValue = map[string]bool{
	"--log": true, "--log-format": true, "--root": true, "--criu": true, "--rootless": true,
	"--bundle": true, "-b": true, "--pid-file": true, "--console-socket": true,
	"--preserve-fds": true, "--process": true, "-p": true, "--resources": true, "-r": true,
	"--cwd": true, "--env": true, "-e": true, "--user": true, "-u": true, "--additional-gids": true,
	"-g": true, "--process-label": true, "--apparmor": true, "--cap": true, "-c": true,
	"--cgroup": true, "--ignore-paused": false, "--pidfd-socket": true, "--format": true,
	"--interval": true, "--image-path": true, "--work-path": true,
}

// takesValue: -f is --format to those that list and --force, without a value, to delete.
func takesValue(command, option string) bool {
	if option == "-f" {
		return command == "list" || command == "ps"
	}
	return withValue[option]
}

// Command is one call of the runtime, taken apart.
type Command struct {
	Global     []string // options before the command, as they are
	Name       string   // "" when there is none
	Options    []string // options after the command, as they are
	Positional []string // container id first, for most
	arguments  []string // all of it
	values     map[string]string
}

// Parse takes runc's arguments (without argv[0]) apart; it knows no errors: what
// it does not understand is passed on unchanged.
func Parse(arguments []string) Command {
	parsed := Command{arguments: arguments, values: map[string]string{}}
	for i := 0; i < len(arguments); i++ {
		word := arguments[i]
		if parsed.Name == "" && commands[word] {
			parsed.Name = word
			continue
		}
		if parsed.Name != "" && word == "--" {
			parsed.Positional = append(parsed.Positional, arguments[i+1:]...)
			break
		}
		if parsed.Name == "exec" && len(parsed.Positional) > 0 {
			// What follows the container id is the process's own, options too.
			parsed.Positional = append(parsed.Positional, arguments[i:]...)
			break
		}
		if !strings.HasPrefix(word, "-") {
			if parsed.Name == "" {
				parsed.Global = append(parsed.Global, word)
			} else {
				parsed.Positional = append(parsed.Positional, word)
			}
			continue
		}
		words := []string{word}
		name, value, joined := strings.Cut(word, "=")
		if !joined && takesValue(parsed.Name, name) && i+1 < len(arguments) {
			i++
			value = arguments[i]
			words = append(words, value)
		}
		parsed.values[strings.TrimLeft(name, "-")] = value
		if parsed.Name == "" {
			parsed.Global = append(parsed.Global, words...)
		} else {
			parsed.Options = append(parsed.Options, words...)
		}
	}
	return parsed
}

// Value of an option, given as --name value or --name=value; short names count.
func (c Command) Value(names ...string) string {
	for _, name := range names {
		if value, found := c.values[name]; found {
			return value
		}
	}
	return ""
}

// Has tells whether an option was given.
func (c Command) Has(name string) bool {
	_, found := c.values[name]
	return found
}

// ContainerID is the first positional argument.
func (c Command) ContainerID() string {
	if len(c.Positional) == 0 {
		return ""
	}
	return c.Positional[0]
}
