// Package sentry is the inside of Kiln's gVisor sandbox: a process that boots
// gVisor's user-space kernel (the sentry) as a library, mounts layer files as
// an overlay, and runs one process after another in it.
//
// Main owns the process it is called in: it takes over GOMAXPROCS and signals,
// starts traced children, installs an irrevocable seccomp filter, and ends by
// exiting. docs/design/sandbox.md tells the order of the boot and why.
//
// It, and what it starts, needs no privilege of the host's, opens no host
// path, and keeps no descriptor but those that package wire names.
package sentry
