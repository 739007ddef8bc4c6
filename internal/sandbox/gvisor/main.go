package gvisor

import (
	"fmt"
	"os"
	"strconv"

	"github.com/kiln-build/kiln/internal/sandbox/gvisor/sentry"
)

// argv[0] of the sandbox's processes, and their roles.
const (
	argv0      = "kiln-sandbox"
	roleShim   = "shim"
	roleSentry = "sentry"
)

// Main does the work of the sandbox's own processes. If args, the process's
// arguments, are those of one, it returns the status to exit with and true;
// else it does nothing. A main function calls it first of all.
func Main(args []string) (code int, handled bool) {
	if len(args) != 3 || args[0] != argv0 {
		return 0, false
	}
	switch args[1] {
	case roleShim:
		n, err := strconv.Atoi(args[2])
		if err != nil || n < 0 {
			fmt.Fprintf(os.Stderr, "%s: bad number of layers %q\n", argv0, args[2])
			return exitShimFailed, true
		}
		return shim(n), true
	case roleSentry:
		return sentry.Main(), true
	}
	return 0, false
}
