package sentry

import (
	"errors"

	"gvisor.dev/gvisor/pkg/sentry/inet"
	"gvisor.dev/gvisor/pkg/sentry/kernel"
	"gvisor.dev/gvisor/pkg/sentry/kernel/auth"
	"gvisor.dev/gvisor/pkg/sentry/socket/hostinet"
	"gvisor.dev/gvisor/pkg/sentry/socket/netfilter"
	"gvisor.dev/gvisor/pkg/sentry/socket/netstack"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/link/loopback"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/raw"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// newNetwork makes the guest's network: the host's sockets passed through, or
// gVisor's own stack with nothing but a loopback interface.
func newNetwork(shared bool, clock tcpip.Clock, k *kernel.Kernel, users *auth.UserNamespace) (*inet.Namespace, error) {
	if !shared {
		return newLoopback(clock, k, users)
	}
	s := hostinet.NewStack()
	// Raw sockets would need the host's CAP_NET_RAW.
	if err := s.Configure(false); err != nil {
		return nil, err
	}
	return inet.NewRootNamespace(s, nil, users), nil
}

func newLoopback(clock tcpip.Clock, k *kernel.Kernel, users *auth.UserNamespace) (*inet.Namespace, error) {
	s := netstack.NewStack(stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
		Clock:              clock,
		Stats:              netstack.Metrics,
		HandleLocal:        true,
		RawFactory:         raw.EndpointFactory{},
		DefaultIPTables:    netfilter.DefaultLinuxTables,
	}), k.UniqueID())
	if err := s.Stack.CreateNICWithOptions(1, ethernet.New(loopback.New()), stack.NICOptions{Name: "lo", DeliverLinkPackets: true}); err != nil {
		return nil, errors.New(err.String())
	}
	var routes []tcpip.Route
	for _, a := range []tcpip.ProtocolAddress{
		{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4([4]byte{127, 0, 0, 1}), PrefixLen: 8}},
		{Protocol: ipv6.ProtocolNumber, AddressWithPrefix: tcpip.AddressWithPrefix{Address: header.IPv6Loopback, PrefixLen: 128}},
	} {
		if err := s.Stack.AddProtocolAddress(1, a, stack.AddressProperties{}); err != nil {
			return nil, errors.New(err.String())
		}
		routes = append(routes, tcpip.Route{Destination: a.AddressWithPrefix.Subnet(), NIC: 1})
	}
	s.Stack.SetRouteTable(routes)
	return inet.NewRootNamespace(s, nil, users), nil
}
