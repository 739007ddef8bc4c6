package cli

import "testing"

func TestParseHost(t *testing.T) {
	for s, want := range map[string]string{
		"a:1.2.3.4": "a 1.2.3.4", "a=1.2.3.4": "a 1.2.3.4", "a:::1": "a ::1", "a=[fe80::1]": "a fe80::1",
	} {
		host, ip, err := parseHost(s)
		if got := host + " " + ip.String(); err != nil || got != want {
			t.Errorf("%q: %q, %v; want %q", s, got, err, want)
		}
	}
	for _, s := range []string{"", "a", "a:", ":1.2.3.4", "a:b", "a:1.2.3"} {
		if _, _, err := parseHost(s); err == nil {
			t.Errorf("%q is taken", s)
		}
	}
}
