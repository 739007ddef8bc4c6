//go:build race

package build_test

// raced: this binary cannot be the sandbox, whose system call filter and
// memory the race detector does not get along with.
const raced = true
