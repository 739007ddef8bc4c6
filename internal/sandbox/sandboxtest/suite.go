package sandboxtest

import (
	"testing"

	"github.com/kiln-build/kiln/internal/sandbox"
)

// Run checks that the sandbox keeps the promises of package sandbox. The
// TestMain of the caller must call GuestMain first.
func Run(t *testing.T, newSandbox func() sandbox.Sandbox, opts Options) {
	h := &harness{
		opts: opts, box: newSandbox(),
		base:  image(t, base(t)...),
		tools: image(t, program("usr/bin/"+guestName, guestTool(t))),
	}
	for _, x := range []struct {
		name string
		test func(*testing.T, *harness)
	}{
		{"Root", testRoot},
		{"User", testUser},
		{"Setuid", testSetuid},
		{"FileCapabilities", testFileCapabilities},
		{"OutputOrder", testOutputOrder},
		{"OutputBinary", testOutputBinary},
		{"OutputLarge", testOutputLarge},
		{"OutputUnbuffered", testOutputUnbuffered},
		{"OutputLeak", testOutputLeak},
		{"Stdin", testStdin},
		{"ExitStatus", testExitStatus},
		{"ExitSignal", testExitSignal},
		{"FailedSessionIsOver", testFailedSessionIsOver},
		{"CannotExecute", testCannotExecute},
		{"PathLookup", testPathLookup},
		{"Daemons", testDaemons},
		{"NoChanges", testNoChanges},
		{"ChangeTypes", testChangeTypes},
		{"Whiteouts", testWhiteouts},
		{"Unchanged", testUnchanged},
		{"Xattrs", testXattrs},
		{"LowerKinds", testLowerKinds},
		{"LargeSparse", testLargeSparse},
		{"Mmap", testMmap},
		{"Unlinked", testUnlinked},
		{"DeepTree", testDeepTree},
		{"SameBytes", testSameBytes},
		{"ImpliedDirectories", testImpliedDirectories},
		{"SessionChain", testSessionChain},
		{"ManyLayers", testManyLayers},
		{"NoLayers", testNoLayers},
		{"SuppliedFiles", testSuppliedFiles},
		{"EtcKeepsItsAttributes", testEtcKeepsItsAttributes},
		{"Scratch", testScratch},
		{"MountKinds", testMountKinds},
		{"MountWriting", testMountWriting},
		{"MountPoints", testMountPoints},
		{"MountNested", testMountNested},
		{"MountTmpfs", testMountTmpfs},
		{"MountMany", testMountMany},
		{"VolumeChanges", testVolumeChanges},
		{"VolumeOfFailedProcess", testVolumeOfFailedProcess},
		{"VolumeUntouched", testVolumeUntouched},
		{"MemoryFile", testMemoryFile},
		{"ReadOnlyRoot", testReadOnlyRoot},
		{"Socket", testSocket},
		{"SocketLarge", testSocketLarge},
		{"SocketSlow", testSocketSlow},
		{"Success", testSuccess},
		{"SetLimits", testSetLimits},
		{"KernelFilesystems", testKernelFilesystems},
		{"WorkingDirectory", testWorkingDirectory},
		{"Environment", testEnvironment},
		{"Arguments", testArguments},
		{"Descriptors", testDescriptors},
		{"Limits", testLimits},
		{"NoHostPaths", testNoHostPaths},
		{"Hostname", testHostname},
		{"Network", testNetwork},
		{"NetworkNone", testNetworkNone},
		{"IPCEnds", testIPCEnds},
		{"Cancel", testCancel},
		{"Close", testClose},
		{"FailingWriters", testFailingWriters},
		{"Parallel", testParallel},
	} {
		t.Run(x.name, func(t *testing.T) { x.test(t, h) })
	}
}
