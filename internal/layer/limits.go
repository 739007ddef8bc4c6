package layer

import "fmt"

// Limits bound what Convert accepts. A layer that goes beyond one of them ends
// in a *LimitError. A field that is 0 has its value from DefaultLimits.
type Limits struct {
	// MaxBytes bounds the tar stream, and separately the sum of all files'
	// sizes (a sparse file's holes count).
	MaxBytes int64
	// MaxFileSize bounds one file's size.
	MaxFileSize int64
	// MaxEntries bounds the number of entries, with the parent directories
	// that the tar does not have. With the next two it bounds Convert's memory.
	MaxEntries int
	// MaxNameBytes bounds the sum of all names in directories and link targets.
	MaxNameBytes int64
	// MaxXattrBytes bounds the sum of all different sets of extended attributes.
	MaxXattrBytes int64
}

// DefaultLimits returns limits far above what real layers need and below what
// would hurt: a hostile layer makes Convert take at most about 400 MB of memory, 128 GiB of disk.
func DefaultLimits() Limits {
	return Limits{
		MaxBytes: 128 << 30, MaxFileSize: 128 << 30,
		MaxEntries: 1 << 20, MaxNameBytes: 64 << 20, MaxXattrBytes: 64 << 20,
	}
}

func (l Limits) withDefaults() Limits {
	d := DefaultLimits()
	if l.MaxBytes <= 0 {
		l.MaxBytes = d.MaxBytes
	}
	if l.MaxFileSize <= 0 {
		l.MaxFileSize = d.MaxFileSize
	}
	if l.MaxEntries <= 0 {
		l.MaxEntries = d.MaxEntries
	}
	if l.MaxNameBytes <= 0 {
		l.MaxNameBytes = d.MaxNameBytes
	}
	if l.MaxXattrBytes <= 0 {
		l.MaxXattrBytes = d.MaxXattrBytes
	}
	return l
}

// LimitError says which limit a layer went beyond.
type LimitError struct {
	Name string // the field of Limits, "MaxBytes"
	What string // what there was too much of: "bytes in the layer's tar"
	Max  int64
}

func (e *LimitError) Error() string {
	return fmt.Sprintf("too many %s: the limit %s is %d", e.What, e.Name, e.Max)
}
