// Answers each line with its number on that connection; one goroutine per connection.
package main

import (
	"bufio"
	"fmt"
	"log"
	"net"
)

func main() {
	listening, err := net.Listen("tcp", ":7000")
	if err != nil {
		log.Fatal(err)
	}
	for {
		connection, err := listening.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go serve(connection)
	}
}

func serve(connection net.Conn) {
	defer connection.Close()
	lines := bufio.NewReader(connection)
	for number := 1; ; number++ {
		line, err := lines.ReadString('\n')
		if err != nil {
			return
		}
		if _, err := fmt.Fprintf(connection, "%d %s", number, line); err != nil {
			log.Print(err)
			return
		}
	}
}
