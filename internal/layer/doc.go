// Package layer knows one layer of an image: as the tar stream that the OCI
// image specification defines, and as the layer file, the form in which Kiln
// keeps it: an EROFS image with what EROFS as gVisor reads it lacks in a table
// behind it (docs/design/layer-format.md).
//
// A layer file is written in one streaming pass over a tar and never changes.
// Memory grows with the number of entries (about 200 bytes each), never with
// their content. Tar streams are hostile input.
package layer
