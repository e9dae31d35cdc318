"""Command-line arguments that several studies have."""

import argparse
import os
from pathlib import Path


def study_parser(doc):
    """Return a parser whose help is the docstring of a module, as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_data_dir(parser):
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("JACTUS_DATA", "../shared/data")),
        help="folders of parquet files",
    )
