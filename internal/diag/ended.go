package diag

import (
	"context"
	"errors"
)

// Ended is the reason why ctx has ended, which is to be told instead of err, what
// came of that; if ctx goes on it is err itself. Of a time that is over (ExitTimeout) the
// place in the Dockerfile that err was at is told too: that is what took so long.
func Ended(ctx context.Context, err error) error {
	cause := context.Cause(ctx)
	if cause == nil {
		return err
	}
	var have *Error
	if ExitCode(cause) == ExitTimeout && errors.As(err, &have) && have.At != nil {
		return &Error{Err: cause, At: have.At, Code: ExitTimeout}
	}
	return cause
}
