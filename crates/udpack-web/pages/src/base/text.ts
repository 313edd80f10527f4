/** Texts in the languages of the page, chosen by `navigator.languages`. */

export type Language = 'en' | 'zh';

/** The first language of the reader that the page has; English where it has none. */
export function chooseLanguage(wanted: readonly string[]): Language {
  for (const tag of wanted) {
    const [primary] = tag.toLowerCase().split('-');
    if (primary === 'zh' || primary === 'en') {
      return primary;
    }
  }
  return 'en';
}

export const language: Language = chooseLanguage(globalThis.navigator?.languages ?? []);

type Values = Readonly<Record<string, string | number>>;
type Tables = Readonly<Record<Language, Readonly<Record<string, string>>>>;

/** All tables by name, for the test that compares their languages. */
export const tables = new Map<string, Tables>();

/**
 * Registers the texts of a part of the page, and returns who says them. `{name}` stands for a value, and
 * `{name|one|many}` for the first word where the value is 1, else for the second.
 */
export function texts<const T extends Readonly<Record<string, string>>>(name: string, en: T, zh: { readonly [K in keyof T]: string }): (key: keyof T & string, values?: Values) => string {
  tables.set(name, { en, zh });
  const own: Readonly<Record<string, string>> = language === 'zh' ? zh : en;
  return (key, values = {}) => fill(own[key] ?? key, values);
}

/** Puts values in their places. */
export function fill(text: string, values: Values): string {
  return text.replace(/\{(\w+)(?:\|([^|}]*)\|([^|}]*))?\}/g, (whole, name: string, one?: string, many?: string) => {
    const value = values[name];
    if (value === undefined) {
      return whole;
    }
    return one === undefined ? `${value}` : `${Number(value) === 1 ? one : many}`;
  });
}
