package layer

import (
	"bytes"
	stdgzip "compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// text is something between random and constant.
func text(n int) []byte {
	rnd := rand.New(rand.NewPCG(1, 2))
	var b bytes.Buffer
	for b.Len() < n {
		fmt.Fprintf(&b, "usr/share/doc/%x/%d\x00\x00", rnd.IntN(5000), rnd.IntN(1e6))
		if rnd.IntN(100) == 0 {
			b.Write(make([]byte, rnd.IntN(3000)))
		}
	}
	return b.Bytes()[:n]
}

func compress(t testing.TB, c Compression, level int, in []byte, chunk int) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := Compress(&out, c, level)
	if err != nil {
		t.Fatal(err)
	}
	for b := range chunks(in, chunk) {
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func chunks(b []byte, n int) func(func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(b) > 0 {
			k := min(n, len(b))
			if !yield(b[:k]) {
				return
			}
			b = b[k:]
		}
	}
}

func decompress(t testing.TB, b []byte) ([]byte, error) {
	t.Helper()
	r, err := Decompress(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

func TestCompressRoundTrip(t *testing.T) {
	for _, n := range []int{0, 1, gzipBlock - 1, gzipBlock, gzipBlock + 1, 3_000_000} {
		in := text(n)
		for _, c := range []Compression{Gzip, Zstd} {
			for _, level := range []int{LeastLevel, 0, 1, 9} {
				b := compress(t, c, level, in, 10000)
				got, err := decompress(t, b)
				if err != nil || !bytes.Equal(got, in) {
					t.Errorf("%s level %d, %d bytes: %v, %d bytes", c, level, n, err, len(got))
				}
				if c == Gzip {
					z, err := stdgzip.NewReader(bytes.NewReader(b))
					if err != nil {
						t.Fatal(err)
					}
					got, err := io.ReadAll(z)
					if err != nil || !bytes.Equal(got, in) {
						t.Errorf("gzip level %d, %d bytes, by compress/gzip: %v", level, n, err)
					}
					if !z.ModTime.IsZero() || b[4]|b[5]|b[6]|b[7] != 0 {
						t.Errorf("gzip has the time %v", z.ModTime)
					}
				} else if zs, err := exec.LookPath("zstd"); err == nil && n > 0 {
					cmd := exec.Command(zs, "-dc")
					cmd.Stdin = bytes.NewReader(b)
					if got, err := cmd.Output(); err != nil || !bytes.Equal(got, in) {
						t.Errorf("zstd level %d, %d bytes, by zstd: %v", level, n, err)
					}
				}
			}
		}
	}
}

// The bytes do not depend on processors, on how input is cut, or on luck.
func TestCompressIsDeterministic(t *testing.T) {
	in := text(6_000_000)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	for _, c := range []Compression{Gzip, Zstd} {
		for _, level := range []int{0, 1, 4, 7} {
			var want [32]byte
			for i, procs := range []int{1, 2, 3, 8, 2} {
				runtime.GOMAXPROCS(procs)
				got := sha256.Sum256(compress(t, c, level, in, []int{len(in), 100, 32 << 10, 999_999, 4096}[i]))
				if i == 0 {
					want = got
				} else if got != want {
					t.Errorf("%s level %d: %d processors give other bytes", c, level, procs)
				}
			}
		}
	}
}

// Blobs made by one version are made by the next, or it is a decision.
func TestCompressGolden(t *testing.T) {
	in := text(1_000_000)
	for c, want := range map[Compression]string{
		Gzip: "d372cd72a0038ab2",
		Zstd: "cbaae756dec94057",
	} {
		if got := fmt.Sprintf("%x", sha256.Sum256(compress(t, c, 0, in, 4096)))[:16]; got != want {
			t.Errorf("%s gives %s, want %s: every blob's digest changes", c, got, want)
		}
	}
}

func TestCompressRefuses(t *testing.T) {
	for _, tt := range []struct {
		c     Compression
		level int
	}{{"", 0}, {"lz4", 0}, {Gzip, -2}, {Gzip, 10}, {Zstd, 23}, {Zstd, -2}} {
		if w, err := Compress(io.Discard, tt.c, tt.level); err == nil {
			t.Errorf("%q level %d is taken", tt.c, tt.level)
			w.Close()
		}
	}
}

type failingWriter struct{ left int }

var errFull = errors.New("full")

func (w *failingWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		return 0, errFull
	}
	return len(p), nil
}

func TestCompressReportsWriteErrors(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 3))
	in := make([]byte, 5<<20)
	for i := range in {
		in[i] = byte(rnd.Uint32())
	}
	for _, c := range []Compression{Gzip, Zstd} {
		before := runtime.NumGoroutine()
		w, err := Compress(&failingWriter{100_000}, c, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = w.Write(in)
		if cerr := w.Close(); err == nil {
			err = cerr
		}
		if !errors.Is(err, errFull) {
			t.Errorf("%s: error %v", c, err)
		}
		for range 100 {
			if runtime.NumGoroutine() <= before {
				break
			}
			runtime.Gosched()
		}
		if n := runtime.NumGoroutine(); n > before {
			t.Errorf("%s leaves %d goroutines", c, n-before)
		}
	}
}

func TestDecompress(t *testing.T) {
	in := text(100_000)
	gz, zs := compress(t, Gzip, 0, in, 5000), compress(t, Zstd, 0, in, 5000)
	skippable := binary.LittleEndian.AppendUint32([]byte{0x53, 0x2a, 0x4d, 0x18}, 3)
	skippable = append(skippable, "abc"...)
	for _, tt := range []struct {
		name string
		in   []byte
		want []byte
		err  string
	}{
		{"plain", in, in, ""},
		{"empty", nil, nil, ""},
		{"short", []byte{0x1f}, []byte{0x1f}, ""},
		{"gzip", gz, in, ""},
		{"two gzip members", bytes.Join([][]byte{gz, gz}, nil), bytes.Join([][]byte{in, in}, nil), ""},
		{"zstd", zs, in, ""},
		{"two zstd frames", bytes.Join([][]byte{zs, zs}, nil), bytes.Join([][]byte{in, in}, nil), ""},
		{"skippable zstd frame first", bytes.Join([][]byte{skippable, zs}, nil), in, ""},
		{"truncated gzip", gz[:len(gz)-9], nil, "unexpected EOF"},
		{"truncated zstd", zs[:len(zs)-9], nil, "unexpected EOF"},
		{"gzip, then garbage", append(bytes.Clone(gz), "garbage, garbage"...), nil, "invalid header"},
		{"gzip, damaged", damage(gz), nil, "decompress layer"},
		{"zstd, damaged", damage(zs), nil, "decompress layer"},
		{"gzip header alone", []byte{0x1f, 0x8b}, nil, "unexpected EOF"},
		// A frame whose header asks for a window of 1 GiB.
		{"zstd bomb", []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 20 << 3, 1, 0, 0, 0}, nil, "window"},
	} {
		got, err := decompress(t, tt.in)
		if tt.err == "" && (err != nil || !bytes.Equal(got, tt.want)) {
			t.Errorf("%s: %v, %d bytes", tt.name, err, len(got))
		}
		if tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%s: error %v, want %q", tt.name, err, tt.err)
		}
	}
}

func damage(b []byte) []byte {
	b = bytes.Clone(b)
	for i := len(b) / 2; i < len(b)/2+40; i++ {
		b[i] ^= 0x5a
	}
	return b
}

// Compressing and decompressing take little memory, however long the stream is.
func TestCompressionMemory(t *testing.T) {
	in := text(1 << 20)
	for _, c := range []Compression{Gzip, Zstd} {
		pr, pw := io.Pipe()
		base := heap()
		w, err := Compress(pw, c, 0)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for range 64 {
				if _, err := w.Write(in); err != nil {
					pw.CloseWithError(err)
					return
				}
			}
			pw.CloseWithError(w.Close())
		}()
		r, err := Decompress(pr)
		if err != nil {
			t.Fatal(err)
		}
		var peak uint64
		buf := make([]byte, 4<<20)
		for {
			if _, err = io.ReadFull(r, buf); err != nil {
				break
			}
			peak = max(peak, heap())
		}
		r.Close()
		if !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		mib := float64(peak-base) / (1 << 20)
		t.Logf("%s: %.1f MiB live with both ends", c, mib)
		if mib > 24 {
			t.Errorf("%s: %.1f MiB live, want at most 16 for compression and 8 for decompression", c, mib)
		}
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func FuzzDecompress(f *testing.F) {
	f.Add(compress(f, Gzip, 0, text(1000), 1000))
	f.Add(compress(f, Zstd, 0, text(1000), 1000))
	z, err := zstd.NewWriter(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(z.EncodeAll(text(5000), nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Decompress(bytes.NewReader(b))
		if err != nil {
			return
		}
		defer r.Close()
		_, _ = io.Copy(io.Discard, io.LimitReader(r, 1<<20))
	})
}

func BenchmarkCompress(b *testing.B) {
	in := text(16 << 20)
	for _, c := range []Compression{Gzip, Zstd} {
		b.Run(string(c), func(b *testing.B) {
			b.SetBytes(int64(len(in)))
			n := 0
			for b.Loop() {
				n = len(compress(b, c, 0, in, 256<<10))
			}
			b.ReportMetric(float64(len(in))/float64(n), "ratio")
		})
	}
}

func BenchmarkDecompress(b *testing.B) {
	in := text(16 << 20)
	for _, c := range []Compression{Gzip, Zstd} {
		z := compress(b, c, 0, in, 256<<10)
		b.Run(string(c), func(b *testing.B) {
			b.SetBytes(int64(len(in)))
			for b.Loop() {
				r, err := Decompress(bytes.NewReader(z))
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, r); err != nil {
					b.Fatal(err)
				}
				r.Close()
			}
		})
	}
}
