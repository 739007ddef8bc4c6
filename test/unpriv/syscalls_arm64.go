package unpriv

import _ "embed"

// syscalls is "name number" a line, from golang.org/x/sys/unix.
//
//go:embed syscalls_arm64.txt
var syscalls string
