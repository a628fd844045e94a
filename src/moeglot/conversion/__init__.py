"""A plan carried out: units streamed into files, here or elsewhere, resumed, certified and named."""
