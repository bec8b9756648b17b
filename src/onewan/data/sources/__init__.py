"""Where clips come from: folders, tables, archives, and what other programs write.

Each kind of source is a module that turns its place into `SourceItem`s: a media file with its
captions, and what else the source says about it. `read` chooses the module, `item` has the form
that all of them share, `remote` copies files from other machines.
"""
