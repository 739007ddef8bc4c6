//go:build cgo

package gvisor

// withCgo: the threads and signals of a C library are not what gVisor expects
// of its process; systrap's stubs die of SIGSEGV and the boot hangs.
const withCgo = true
