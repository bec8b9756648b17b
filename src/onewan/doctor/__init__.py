"""`onewan doctor`: whether the machine, the clips and the captions are ready for a run.

`environment` looks at the machine and needs nothing but Python, so that it answers where torch or
another package is missing or broken. `examination` goes through the clips of a run with the
trainer's own planner and reader, decoding each of them in parallel: `pixels`, `captions` and
`duplicates` judge what they are given, `needs` adds disk, time and memory. `diagnosis` is the
result as text and as data, `page` as an HTML page, and `repair` changes captions to UTF-8. No
module prints, and none loads a model.
"""
