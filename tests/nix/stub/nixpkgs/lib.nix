# The functions of nixpkgs' lib that the flake calls.
builtins
// rec {
  genAttrs =
    names: value:
    builtins.listToAttrs (
      map (name: {
        inherit name;
        value = value name;
      }) names
    );
  importJSON = file: builtins.fromJSON (builtins.readFile file);
  importTOML = file: fromTOML (builtins.readFile file);
  inherit (builtins) replaceStrings;
  optional = condition: value: if condition then [ value ] else [ ];
  optionals = condition: values: if condition then values else [ ];
  optionalAttrs = condition: attrs: if condition then attrs else { };
  mapAttrsToList = value: attrs: map (name: value name attrs.${name}) (builtins.attrNames attrs);
  hasPrefix = prefix: text: builtins.substring 0 (builtins.stringLength prefix) text == prefix;
  removeSuffix =
    suffix: text:
    let
      length = builtins.stringLength text - builtins.stringLength suffix;
    in
    if builtins.substring length (-1) text == suffix then
      builtins.substring 0 length text
    else
      text;
  splitString =
    separator: text: builtins.filter builtins.isString (builtins.split "[${separator}]" text);
  getName = package: package.pname;
  getExe = package: "${package}/bin/${package.meta.mainProgram}";
  licenses.asl20.spdxId = "Apache-2.0";
  head = builtins.head;
  fileset = {
    unions = builtins.concatMap (path: if builtins.pathExists path then [ path ] else throw "${toString path} is not there");
    # All of the root: the files of `fileset` exist, but nothing is built from them here.
    toSource = { root, fileset }: builtins.deepSeq fileset root;
  };
}
