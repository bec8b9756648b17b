"""Run files to start from, by variant, method, purpose and the memory of a card.

`recipes` has what is known of each purpose, `starter` writes the text of a run file, `fitting`
finds the values that fit a device, `model_files` the files of ComfyUI; `made` puts them together,
for `onewan init` and for the page alike. `run_files` lists those in ``configs/``. Nothing here
prints.
"""
