"""The five stages: one public function each, named as its file. Typed inputs in, a draft to write to."""
