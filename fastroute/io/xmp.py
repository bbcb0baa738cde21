"""XMP as bytes: statements that no longer hold are corrected or removed, everything else is preserved."""

from __future__ import annotations

import re
from xml.etree import ElementTree

# Names of things that a file holds besides the picture that is read. A result does not contain them.
CLAIMS = {
    b"http://ns.adobe.com/hdr-gain-map/1.0/": (b"", "a gain map"),
    b"http://ns.apple.com/HDRGainMap/1.0/": (b"", "a gain map"),
    b"http://ns.apple.com/pixeldatainfo/1.0/": (b"", "a gain map"),
    b"http://ns.google.com/photos/1.0/container/": (b"", "further pictures in the file"),
    b"http://ns.google.com/photos/1.0/container/item/": (b"", "further pictures in the file"),
    b"http://ns.google.com/photos/dd/1.0/container/": (b"", "further pictures in the file"),
    b"http://ns.google.com/photos/dd/1.0/item/": (b"", "further pictures in the file"),
    b"http://ns.google.com/photos/dd/1.0/device/": (b"", "further pictures in the file"),
    b"http://ns.google.com/photos/1.0/depthmap/": (b"", "a depth map"),
    b"http://ns.google.com/photos/1.0/image/": (b"", "a second image"),
    b"http://ns.google.com/photos/1.0/audio/": (b"", "a recording"),
    b"http://ns.google.com/photos/1.0/panorama/": (b"Cropped|Full|Initial", "the size of a panorama"),
    b"http://ns.google.com/photos/1.0/camera/": (b"MotionPhoto|MicroVideo", "a motion photo"),
    b"http://ns.adobe.com/xmp/note/": (b"HasExtendedXMP", "a second packet of XMP"),
}
# A longer packet is not searched.
LONGEST = 1 << 22


def upright(packet: bytes) -> bytes:
    """The packet with its orientation set to upright."""
    packet = re.sub(rb'(tiff:Orientation\s*=\s*["\'])\d', rb"\g<1>1", packet)
    return re.sub(rb"(<tiff:Orientation>\s*)\d", rb"\g<1>1", packet)


def sized(packet: bytes, width: int, height: int) -> bytes:
    """The packet with the size of the picture corrected, if it has one."""
    for names, value in (
        (rb"exif:PixelXDimension|tiff:ImageWidth", width),
        (rb"exif:PixelYDimension|tiff:ImageLength", height),
    ):
        number = str(value).encode()
        packet = re.sub(rb'((?:%b)\s*=\s*["\'])\d+' % names, rb"\g<1>%b" % number, packet)
        packet = re.sub(rb"(<(?:%b)>\s*)\d+" % names, rb"\g<1>%b" % number, packet)
    return packet


def without_claims(packet: bytes) -> tuple[bytes | None, list[str]]:
    """The packet without statements about things that a result does not contain, and the names of these things.

    The packet is None if it cannot be corrected: it was well formed and would not be any more.
    """
    if len(packet) > LONGEST:
        return None, ["a packet of XMP of more than 4 MB"]
    removed = []
    mended = packet
    for space, (names, what) in CLAIMS.items():
        for prefix in re.findall(rb'xmlns:([\w.-]+)\s*=\s*["\']%b["\']' % re.escape(space), packet):
            name = re.escape(prefix) + rb":(?:%b)[\w.-]*" % names
            before = mended
            mended = re.sub(rb"\s%b\s*=\s*(?:\"[^\"]*\"|'[^']*')" % name, b"", mended)
            mended = re.sub(rb"<(%b)(?:\s[^<>]*)?(?:/>|(?<!/)>.*?</\1\s*>)" % name, b"", mended, flags=re.DOTALL)
            if mended != before:
                removed.append(what)
                if not re.search(rb"[<\s/]%b:" % re.escape(prefix), mended):
                    mended = re.sub(rb"\sxmlns:%b\s*=\s*(?:\"[^\"]*\"|'[^']*')" % re.escape(prefix), b"", mended)
    removed = sorted(set(removed))
    if removed and is_well_formed(packet) and not is_well_formed(mended):
        return None, removed
    return mended, removed


def is_well_formed(packet: bytes) -> bool:
    """Whether the packet is an XML document in UTF-8 between its processing instructions."""
    try:
        ElementTree.fromstring(re.sub(rb"<\?xpacket.*?\?>", b"", packet, flags=re.DOTALL).strip().strip(b"\0"))
    except (ElementTree.ParseError, ValueError):
        return False
    return True
