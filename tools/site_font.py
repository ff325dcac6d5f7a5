"""The font of the site's mathematics, so that it looks alike where a reader has none: STIX Two Math, cut to size.

A hook of MkDocs. The font (SIL Open Font License) comes from the package ziamath, which ships it.
"""

import io
from importlib.resources import files as resources

from fontTools import subset
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# Latin, Greek, punctuation, arrows, operators, brackets, and the mathematical letters.
RANGES = (
    (0x20, 0x7F),
    (0x370, 0x400),
    (0x2000, 0x2070),
    (0x2100, 0x2150),
    (0x2190, 0x2300),
    (0x2308, 0x230C),
    (0x1D400, 0x1D800),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """What MkDocs calls once it knows the files of the site."""
    options = subset.Options(layout_features=["*"])
    with resources("ziamath").joinpath("fonts/STIXTwoMath-Regular.ttf").open("rb") as source:
        font = subset.load_font(source, options)
        cut = subset.Subsetter(options)
        cut.populate(unicodes=[code for low, high in RANGES for code in range(low, high)])
        cut.subset(font)
        content = io.BytesIO()
        font.save(content)
    files.append(File.generated(config, "fonts/math.ttf", content=content.getvalue()))
    return files
