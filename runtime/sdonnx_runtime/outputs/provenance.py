"""Where an image comes from, as IPTC's photo metadata says it: an XMP packet in the image's file."""

from PIL import Image

from sdonnx_runtime.request import CompleteRequest

XMP_KEY = "XML:com.adobe.xmp"
"""The keyword of XMP in a PNG's text."""

_MAX_BYTES = 60_000
"""Of a packet that is kept; a JPEG's segment holds little more."""

_TERMS = "http://cv.iptc.org/newscodes/digitalsourcetype/"

_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmp:CreatorTool="sdonnx"
    Iptc4xmpExt:DigitalSourceType="{source}"/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""


def digital_source_type(request: CompleteRequest) -> str:
    """Return IPTC's URI for the image of a request, https://cv.iptc.org/newscodes/digitalsourcetype.

    An image that was made of another one is a composite, as IPTC says of inpainting and outpainting. Edges, depths and
    poses guide an image; they are no part of it.
    """
    made_of_another = (request.image, request.strength, request.image_guidance_scale) != (None, None, None)
    return _TERMS + ("compositeWithTrainedAlgorithmicMedia" if made_of_another else "trainedAlgorithmicMedia")


def xmp_packet(request: CompleteRequest) -> str:
    """Write the XMP packet of an image: its digital source type, and the tool that made it."""
    return _PACKET.format(source=digital_source_type(request))


def read_xmp(image: Image.Image) -> str | None:
    """Read the XMP packet of an opened PNG, JPEG or WebP; None if it has none, or one of more than 60 kB."""
    packet = image.info.get(XMP_KEY, image.info.get("xmp"))
    text = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else packet
    return text if isinstance(text, str) and len(text.encode("utf-8", "replace")) <= _MAX_BYTES else None
