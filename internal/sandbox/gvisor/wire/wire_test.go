package wire

import (
	"bytes"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
)

func TestRoundTrip(t *testing.T) {
	var b bytes.Buffer
	c := NewConn(&b)
	want := Process{Args: Texts([]string{"sh", "-c", "printf '\xff\xfe'"}), Env: []Text{}, Cwd: Text("/\xe4"), UID: 1, GID: 2, Groups: []uint32{3}}
	if err := c.WriteJSON(TypeProcess, want); err != nil {
		t.Fatal(err)
	}
	var got Process
	if err := c.ReadJSON(TypeProcess, &got); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if _, _, err := c.Read(); err != io.EOF {
		t.Errorf("after the last frame: %v, want EOF", err)
	}
}

func TestPieces(t *testing.T) {
	var b bytes.Buffer
	c := NewConn(&b)
	data := bytes.Repeat([]byte("0123456789abcdef"), MaxPiece/4)
	if n, err := (Pieces{c, TypeChanges}).Write(data); n != len(data) || err != nil {
		t.Fatal(n, err)
	}
	var got []byte
	for {
		ty, p, err := c.Read()
		if err == io.EOF {
			break
		}
		if err != nil || ty != TypeChanges || len(p) > MaxPiece {
			t.Fatal(ty, len(p), err)
		}
		got = append(got, p...)
	}
	if !bytes.Equal(got, data) {
		t.Error("pieces do not add up")
	}
}

func TestTornStream(t *testing.T) {
	var b bytes.Buffer
	if err := NewConn(&b).Write(TypeOutput, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	whole := b.Bytes()
	for n := 1; n < len(whole); n++ {
		_, _, err := NewConn(bytes.NewBuffer(whole[:n])).Read()
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d of %d bytes: %v, want an unexpected EOF", n, len(whole), err)
		}
	}
}

func TestOversized(t *testing.T) {
	_, _, err := NewConn(bytes.NewBufferString("o\xff\xff\xff\xff")).Read()
	if err == nil || !strings.Contains(err.Error(), "allowed") {
		t.Errorf("got %v", err)
	}
	if err := NewConn(&bytes.Buffer{}).Write(TypeOutput, make([]byte, MaxPayload+1)); err == nil {
		t.Error("wrote an oversized frame")
	}
}

func FuzzRead(f *testing.F) {
	var b bytes.Buffer
	c := NewConn(&b)
	c.WriteJSON(TypeResult, Result{Code: 3})
	c.Write(TypeOutput, []byte("x"))
	f.Add(b.Bytes())
	f.Add([]byte("R\x00\x00\x00\x02{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c := NewConn(bytes.NewBuffer(data))
		var r Result
		_ = c.ReadJSON(TypeResult, &r)
		for {
			if _, _, err := c.Read(); err != nil {
				return
			}
		}
	})
}
