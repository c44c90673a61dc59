"""Samples in tables: Parquet files, and Arrow files as `save_to_disk` of the library `datasets` writes them.

A row is a sample: `columns` makes of it the members that a tar would hold, so that nothing behind the reading knows the
difference. `parquet` and `arrow` find the row groups of a file and decode one from its byte ranges; `row_group` is what
the manifest keeps of one, and how it is read again; `index` goes through the files of a prefix.

A record batch of an Arrow file is called a row group, too.
"""
