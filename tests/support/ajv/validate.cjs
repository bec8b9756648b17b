// Validates documents with ajv, for tests/unit/test_schema.py.
//
// Standard input is {"schema": ..., "documents": {NAME: DOCUMENT}}, standard output {NAME: ERRORS}.
// Regular expressions are those of Unicode text, as ajv and editors use them. An invalid schema ends
// the program with an error.
"use strict";

const { readFileSync } = require("node:fs");
const Ajv = require("ajv/dist/2020").default;

const { schema, documents } = JSON.parse(readFileSync(0, "utf8"));
const ajv = new Ajv({ allErrors: true, allowUnionTypes: true });
const validate = ajv.compile(schema);
const errors = {};
for (const [name, document] of Object.entries(documents)) {
  errors[name] = validate(document)
    ? []
    : validate.errors.map((error) => `${error.instancePath} ${error.message}`);
}
console.log(JSON.stringify(errors));
