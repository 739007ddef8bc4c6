package ctl

import "testing"

// TestSharedKey tells directories apart by all that they are called.
func TestSharedKey(t *testing.T) {
	one := map[string]string{"context": "/a", "dockerfile": "/b"}
	if k := sharedKey(one); k == "" || k != sharedKey(map[string]string{"dockerfile": "/b", "context": "/a/../a"}) {
		t.Errorf("the same directories have another key than %q", k)
	}
	for _, other := range []map[string]string{{"context": "/b", "dockerfile": "/a"}, {"context": "/a"}, {"context": "a", "dockerfile": "/b"}, nil} {
		if sharedKey(other) == sharedKey(one) {
			t.Errorf("%v have the key of %v", other, one)
		}
	}
	if k := sharedKey(nil); k != "" {
		t.Errorf("no directory has the key %q", k)
	}
}
