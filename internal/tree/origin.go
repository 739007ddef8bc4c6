package tree

// Origin names one file of one layer, whatever it is seen through. The zero
// value is of a file that is in no layer, or nobody knows in which.
type Origin struct {
	Layer string
	Inode uint64
}

// Tracer is a Tree that knows which layers its files are of.
type Tracer interface {
	Tree
	// Origin is that of what is at path, which is no directory.
	Origin(path string) (Origin, error)
}

// OriginOf is the origin of what is at path: unknown if t is no Tracer.
func OriginOf(t Tree, path string) (Origin, error) {
	if x, ok := t.(Tracer); ok {
		return x.Origin(path)
	}
	return Origin{}, nil
}
