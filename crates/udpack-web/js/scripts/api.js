// Writes the pages of the API, `docs/udpack.md`, `docs/transfer.md` and `docs/rooms.md`, and their list in README.md, from the types of the
// sources. With `--check` it writes nothing and compares: they are committed. TypeScript 7 has no interface for programs
// yet, so its declarations are read with the one of version 6.
import { spawnSync } from 'node:child_process';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import ts from 'typescript-api';

process.chdir(fileURLToPath(new URL('..', import.meta.url)));
const check = process.argv.includes('--check');
const TYPES = 'build/types';
const PAGES = [
  { page: 'docs/udpack.md', module: 'udpack', entry: `${TYPES}/index.d.ts` },
  { page: 'docs/transfer.md', module: 'udpack/transfer', entry: `${TYPES}/transfer/index.d.ts` },
  { page: 'docs/rooms.md', module: 'udpack/rooms', entry: `${TYPES}/rooms/index.d.ts` },
];
const NOTE = '<!-- Made by scripts/api.js from the types: change the sources, then run `npm run build`. -->';
const KINDS = ['function', 'class', 'const', 'interface', 'type'];

const { status } = spawnSync(process.execPath, ['node_modules/typescript/bin/tsc', '-p', 'tsconfig.types.json', '--outDir', TYPES], { stdio: 'inherit' });
if (status !== 0) process.exit(1);

const program = ts.createProgram(PAGES.map(({ entry }) => entry), {
  target: ts.ScriptTarget.ES2022,
  module: ts.ModuleKind.NodeNext,
  moduleResolution: ts.ModuleResolutionKind.NodeNext,
  lib: ['lib.es2023.d.ts', 'lib.esnext.disposable.d.ts', 'lib.webworker.d.ts'],
  types: [],
});
const checker = program.getTypeChecker();
const printer = ts.createPrinter({ removeComments: true });

const resolve = (symbol) => (symbol.flags & ts.SymbolFlags.Alias ? checker.getAliasedSymbol(symbol) : symbol);
const isOurs = (declaration) => declaration.getSourceFile().fileName.includes(TYPES);
const text = (node) => printer.printNode(ts.EmitHint.Unspecified, node, node.getSourceFile()).replace(/\s+/g, ' ').replace(/;$/, '');
/** A text with its links as code, in lines that belong to each other. */
const prose = (parts) => ts.displayPartsToString(parts).replace(/\{@link (\S+?)\}/g, '`$1`').replace(/[ \t]*\n[ \t]*(?=\S)/g, ' ').trim();

function doc(symbol) {
  const throws = symbol.getJsDocTags(checker).filter(({ name }) => name === 'throws').map(({ text: parts }) => {
    const [, type, why] = /^\{?(\w+)\}?\s*(.*)$/s.exec(prose(parts ?? [])) ?? [];
    return `Throws \`${type}\`${why ? `: ${why[0].toLowerCase()}${why.slice(1)}` : '.'}`;
  });
  return [prose(symbol.getDocumentationComment(checker)), ...throws].filter(Boolean).join(' ');
}

/** What an application sees of a class or interface: no constructor that is given what it cannot have. */
function membersOf(declaration) {
  return declaration.members.filter((member) => {
    const hidden = ts.getCombinedModifierFlags(member) & (ts.ModifierFlags.Private | ts.ModifierFlags.Protected);
    const isMade = ts.isConstructorDeclaration(member) && (/^Made by /.test(commentOf(member)) || [...named(member)].some((symbol) => !homes.has(symbol) && !(symbol.flags & ts.SymbolFlags.TypeAlias)));
    return !hidden && !isMade && !member.name?.getText().startsWith('[internals]');
  });
}

function commentOf(node) {
  return (ts.getJSDocCommentsAndTags(node)[0]?.comment ?? '').toString();
}

/** A member, and what is said of it: once, of several with its name. */
function memberLine(member, at, all) {
  const signature = text(member);
  const isAgain = all.slice(0, at).some((other) => other.symbol === member.symbol);
  const about = isAgain ? '' : doc(member.symbol);
  return `- \`${signature}\`${about ? `\\\n  ${about}` : ''}`;
}

function kindOf(declaration) {
  if (ts.isFunctionDeclaration(declaration)) return 'function';
  if (ts.isClassDeclaration(declaration)) return 'class';
  if (ts.isInterfaceDeclaration(declaration)) return 'interface';
  return ts.isTypeAliasDeclaration(declaration) ? 'type' : 'const';
}

/** The head of a class or interface: its name, what it takes and what it is besides. */
function headOf(declaration) {
  const parameters = declaration.typeParameters ? `<${declaration.typeParameters.map(text).join(', ')}>` : '';
  const clauses = (declaration.heritageClauses ?? []).map((clause) => ` ${text(clause).trim()}`).join('');
  return `${kindOf(declaration)} ${declaration.name.text}${parameters}${clauses}`;
}

function section(name, symbol) {
  const declarations = symbol.declarations.filter((declaration) => !ts.isNamespaceExport(declaration));
  const [first] = declarations;
  const lines = [`### ${name}`, ''];
  const about = doc(symbol);
  if (about) lines.push(about, '');
  if (ts.isClassDeclaration(first) || ts.isInterfaceDeclaration(first)) {
    lines.push('```ts', headOf(first), '```', '');
    const members = membersOf(first);
    if (members.length > 0) lines.push(...members.map(memberLine), '');
  } else {
    const whole = declarations.map((declaration) => {
      const statement = ts.isVariableDeclaration(declaration) ? declaration.parent.parent : declaration;
      const at = statement.getStart();
      return statement.getSourceFile().text.slice(at, statement.end).replace(/^export /, '').replace(/^declare /, '');
    });
    lines.push('```ts', ...whole, '```', '');
  }
  return lines;
}

/** Types of ours that a part of a declaration names. */
function named(part, found = new Set()) {
  const visit = (node) => {
    if (ts.isTypeReferenceNode(node) || ts.isExpressionWithTypeArguments(node)) {
      const symbol = checker.getSymbolAtLocation(node.typeName ?? node.expression);
      const target = symbol && resolve(symbol);
      if (target?.declarations?.some(isOurs) && !(target.flags & ts.SymbolFlags.TypeParameter)) found.add(target);
    }
    ts.forEachChild(node, visit);
  };
  visit(part);
  return found;
}

/** Types of ours that an application meets in a declaration. */
function mentioned(declaration, found) {
  const isMembers = ts.isClassDeclaration(declaration) || ts.isInterfaceDeclaration(declaration);
  for (const part of isMembers ? [...membersOf(declaration), ...(declaration.heritageClauses ?? [])] : [declaration]) named(part, found);
}

const byName = (a, b) => (a.name < b.name ? -1 : 1);
const homes = new Map();
const modules = PAGES.map((page) => {
  const exports = checker.getExportsOfModule(checker.getSymbolAtLocation(program.getSourceFile(page.entry)));
  const names = exports.map((symbol) => ({ name: symbol.name, symbol: resolve(symbol) })).sort(byName);
  for (const { symbol } of names) if (!homes.has(symbol)) homes.set(symbol, page.module);
  return { ...page, names };
});

let differs = false;
function put(path, wanted) {
  let committed = '';
  try {
    committed = readFileSync(path, 'utf8');
  } catch {
    // Not there: it differs.
  }
  if (committed === wanted) return;
  if (check) {
    console.error(`${path} is not what the types make: run \`npm run build\` and commit it`);
    differs = true;
  } else {
    writeFileSync(path, wanted);
  }
}

mkdirSync('docs', { recursive: true });
const list = [];
for (const { page, module, names } of modules) {
  const lines = [NOTE, '', `# ${module}`, '', 'The [README](../README.md) says what to use for what.', ''];
  const anchors = new Map();
  const all = new Set(names.map(({ symbol }) => symbol));
  for (const kind of KINDS) {
    const these = names.filter(({ symbol }) => kindOf(symbol.declarations[0]) === kind);
    if (these.length === 0) continue;
    lines.push(`## ${{ function: 'Functions', class: 'Classes', const: 'Constants', interface: 'Interfaces', type: 'Types' }[kind]}`, '');
    const links = [];
    for (const { name, symbol } of these) {
      lines.push(...section(name, symbol));
      // The second heading of the same letters has a number.
      const at = name.toLowerCase();
      const before = anchors.get(at) ?? 0;
      anchors.set(at, before + 1);
      links.push(`[${name}](${page}#${at}${before > 0 ? `-${before}` : ''})`);
    }
    list.push({ module, kind, links });
  }
  // What the exported names mention and is not exported itself, to the end of the chain.
  const others = new Set();
  let from = [...all];
  while (from.length > 0) {
    const found = new Set();
    for (const symbol of from) for (const declaration of symbol.declarations) mentioned(declaration, found);
    from = [...found].filter((symbol) => !all.has(symbol) && !others.has(symbol) && !homes.has(symbol));
    for (const symbol of from) others.add(symbol);
  }
  if (others.size > 0) {
    lines.push('## Mentioned above, and not exported', '');
    for (const symbol of [...others].sort(byName)) lines.push(...section(symbol.name, symbol));
  }
  put(page, `${lines.join('\n').trimEnd()}\n`);
}

const BEGIN = '<!-- the list of names, made by scripts/api.js -->';
const END = '<!-- its end -->';
const readme = readFileSync('README.md', 'utf8');
const [head, rest] = readme.split(BEGIN);
const tail = rest?.split(END)[1];
if (tail === undefined) throw new Error(`README.md has no place between ${BEGIN} and ${END}`);
const rows = list.map(({ module, kind, links }) => `| \`${module}\` | ${kind} | ${links.join(', ')} |`);
put('README.md', `${head}${BEGIN}\n| from | | names |\n| --- | --- | --- |\n${rows.join('\n')}\n${END}${tail}`);
process.exit(differs ? 1 : 0);
