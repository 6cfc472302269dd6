"""Files of encoded and plain arrays: safetensors, with the description of the encoded ones in its metadata.

Two byte planes stand for each encoded array (docs/spec.md section 7): `<name>.hbfp_exponents` and
`<name>.hbfp_mantissas`, described by one JSON text under the metadata key `hbfp`. Any safetensors reader opens such a
file; this one believes nothing that it says before it has checked it.

From the inside out: `strict` reads JSON, `container` the file, `description` what it says of encoded arrays, `index`
that of a model in shards, `replacing` puts whole files in their places; `reading` and `writing` are what users call.
"""

from hbfp.files.container import Entry
from hbfp.files.description import Description
from hbfp.files.reading import File, load, load_metadata
from hbfp.files.writing import Deferred, save

open = File
"""`hbfp.open(path)`: a file as a mapping from names to arrays, of which only what is used is read; see `File`."""

__all__ = ["Deferred", "Description", "Entry", "File", "load", "load_metadata", "open", "save"]
